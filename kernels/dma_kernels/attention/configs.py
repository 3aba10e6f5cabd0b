"""Tiles, warps, pipeline stages and registers of the attention kernels.

The fastest configuration depends on the GPU, the element size and the head dim, and hardly on anything else. Nothing is
measured during training: measuring would delay the first step, fail inside a CUDA graph, and could change the bits of
the next run. This file has the table of one GPU. `python -m dma_kernels.tune` measures another GPU, and writes a file
that every later process on such a GPU finds. The environment variable `DMA_KERNEL_CONFIGS` names a file to use instead,
or is `builtin` for the table here.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

Kernel = Literal["forward", "query gradients", "key gradients"]


class KernelConfig(NamedTuple):
    """Sizes of a kernel's tiles, and how its programs run.

    Attributes:
        rows: size of the tile that stays in registers: queries, or for the key gradients, keys. A power of two from 16.
        columns: size of the tiles of the loop: slots, or for the key gradients, queries. A power of two from 16. The
            query gradients take no more columns than the key gradients have rows.
        warps: warps of a program, a power of two.
        stages: stages of the pipeline that loads tiles.
        registers: limit per thread, so that several programs fit on a multiprocessor; None leaves it to the compiler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


Table = dict[tuple[Kernel, int, int], KernelConfig]  # by kernel, element size in bytes, padded head dim

# Measured on an NVIDIA H200 (benchmarks/results/tune_kernels.json), except for the query gradients: those are guesses.
BUILTIN: Table = {
    ("forward", 2, 64): KernelConfig(64, 32, 4, 2),
    ("forward", 2, 128): KernelConfig(128, 64, 8, 2, 128),
    ("forward", 2, 256): KernelConfig(128, 64, 8, 2),
    ("forward", 4, 64): KernelConfig(32, 32, 4, 2),
    ("forward", 4, 128): KernelConfig(32, 32, 4, 2),
    ("forward", 4, 256): KernelConfig(32, 32, 4, 2),
    ("query gradients", 2, 64): KernelConfig(128, 64, 8, 4),
    ("query gradients", 2, 128): KernelConfig(128, 64, 8, 3),
    ("query gradients", 2, 256): KernelConfig(128, 64, 8, 3),
    ("query gradients", 4, 64): KernelConfig(64, 32, 4, 2),
    ("query gradients", 4, 128): KernelConfig(64, 32, 4, 2),
    ("query gradients", 4, 256): KernelConfig(64, 32, 8, 2),
    ("key gradients", 2, 64): KernelConfig(64, 64, 4, 2, 168),
    ("key gradients", 2, 128): KernelConfig(64, 64, 4, 2),
    ("key gradients", 2, 256): KernelConfig(64, 64, 8, 2),
    ("key gradients", 4, 64): KernelConfig(32, 32, 8, 2),
    ("key gradients", 4, 128): KernelConfig(32, 32, 8, 2),
    ("key gradients", 4, 256): KernelConfig(32, 32, 8, 2),
}


def kernel_config(kernel: Kernel, x: torch.Tensor, block_d: int) -> KernelConfig:
    """The configuration of a kernel for tensors like `x` with head dims up to `block_d`, a power of two."""
    return _table(x.device)[kernel, x.element_size(), max(64, block_d)]


@functools.cache
def _table(device: torch.device) -> Table:
    """The table of a device; entries that its file leaves out come from the built-in table."""
    pinned = os.environ.get("DMA_KERNEL_CONFIGS")
    if pinned == "builtin" or device.type != "cuda":
        return BUILTIN
    path = Path(pinned) if pinned else tuned_file(torch.cuda.get_device_name(device))
    if not pinned and not path.exists():
        return BUILTIN
    return BUILTIN | read_table(path)


def tuned_file(gpu: str) -> Path:
    """Path of the file with the measured table of a GPU."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dma_kernels" / f"{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.json"


def read_table(path: Path) -> Table:
    """The fastest configurations of a file that `dma_kernels.tune` wrote.

    Raises:
        ValueError: if the file is missing or has other contents.
    """
    try:
        return _table_of(_read_json(path))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a table of kernel configurations: {error}; "
            f"write one with `python -m dma_kernels.tune --out {path}`, or set DMA_KERNEL_CONFIGS=builtin"
        ) from error


def _read_json(path: Path) -> Any:
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise ValueError("got something that is not a regular file")
    return json.loads(path.read_text(encoding="utf-8"))


def _table_of(content: Any) -> Table:
    """The rows that are marked as the fastest, checked."""
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows: expected a list of objects")
    fastest = {f"rows[{i}]": row for i, row in enumerate(rows) if row.get("fastest")}
    if not fastest:
        raise ValueError("rows: expected at least one that is marked as the fastest, got none")
    return {_place(at, row): _config(at, row) for at, row in fastest.items()}


def _place(at: str, row: dict[str, Any]) -> tuple[Kernel, int, int]:
    """The entry of the table that a row describes."""
    allowed = {"kernel": get_args(Kernel), "element_bytes": (2, 4), "head_dim": (64, 128, 256)}
    for name, values in allowed.items():
        _check_one_of(f"{at}.{name}", row.get(name), values)
    return row["kernel"], row["element_bytes"], row["head_dim"]


def _config(at: str, row: dict[str, Any]) -> KernelConfig:
    """The configuration in a row; its registers may be left out."""
    config = row.get("config")
    if not isinstance(config, list) or len(config) not in (4, 5):
        raise ValueError(f"{at}.config: expected a list of {KernelConfig._fields}, got {str(config)[:99]}")
    tiles, warps = tuple(1 << i for i in range(4, 11)), tuple(1 << i for i in range(6))
    allowed = (tiles, tiles, warps, tuple(range(1, 9)), (None, *range(32, 256, 8)))
    for name, value, values in zip(KernelConfig._fields, config, allowed, strict=False):
        _check_one_of(f"{at}.config: {name}", value, values)
    return KernelConfig(*config)


def _check_one_of(what: str, value: Any, values: tuple[Any, ...]) -> None:
    """Raise `ValueError` unless a value is one of several and of the same type: 1.0 and True are not 1."""
    if not any(type(value) is type(x) and value == x for x in values):
        raise ValueError(f"{what}: expected one of {list(values)}, got {str(value)[:99]!r}")
