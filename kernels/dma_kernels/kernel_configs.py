"""Tiles, warps, pipeline stages and registers of the attention kernels.

Which configuration is fastest depends on the GPU, the size of an element and the head dim, hardly on anything else.
None is measured while training: that would delay the first step, fail inside a CUDA graph, and give other bits in the
next run. A table of one GPU is here; `python -m dma_kernels.tune` measures that of another and keeps it in a file that
every later process on such a GPU finds. The environment variable `DMA_KERNEL_CONFIGS` names a file to use instead, or
is `builtin` for the table here.
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
    """How a kernel is cut.

    Attributes:
        rows: of a tile that stays in registers: queries, or keys for the key gradients; a power of two from 16.
        columns: of a tile that passes by: slots, or queries for the key gradients; a power of two from 16.
        warps: of a program, a power of two.
        stages: of the pipeline that loads tiles.
        registers: of a thread at most, so that several programs fit on a core; None leaves it to the compiler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


Table = dict[tuple[Kernel, int, int], KernelConfig]  # by kernel, bytes of an element, padded head dim

# Measured on an NVIDIA H200 (benchmarks/results/tune_kernels.json).
BUILTIN: Table = {
    ("forward", 2, 64): KernelConfig(64, 32, 4, 2),
    ("forward", 2, 128): KernelConfig(128, 64, 8, 2, 128),
    ("forward", 2, 256): KernelConfig(128, 64, 8, 2),
    ("forward", 4, 64): KernelConfig(32, 32, 4, 2),
    ("forward", 4, 128): KernelConfig(32, 32, 4, 2),
    ("forward", 4, 256): KernelConfig(32, 32, 4, 2),
    ("query gradients", 2, 64): KernelConfig(64, 32, 4, 3),
    ("query gradients", 2, 128): KernelConfig(64, 32, 4, 2, 168),
    ("query gradients", 2, 256): KernelConfig(64, 32, 4, 3),
    ("query gradients", 4, 64): KernelConfig(64, 32, 8, 2),
    ("query gradients", 4, 128): KernelConfig(32, 32, 4, 2),
    ("query gradients", 4, 256): KernelConfig(16, 16, 4, 1),
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
    """The table of a device, with what its file leaves out taken from the built-in one."""
    pinned = os.environ.get("DMA_KERNEL_CONFIGS")
    if pinned == "builtin" or device.type != "cuda":
        return BUILTIN
    path = Path(pinned) if pinned else tuned_file(torch.cuda.get_device_name(device))
    if not pinned and not path.exists():
        return BUILTIN
    return BUILTIN | read_table(path)


def tuned_file(gpu: str) -> Path:
    """Where the measured table of a GPU is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dma_kernels" / f"{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.json"


def read_table(path: Path) -> Table:
    """The fastest configurations of a file that `dma_kernels.tune` wrote.

    Raises:
        ValueError: if the file is missing or says something else.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        table = dict(_entry(row) for row in rows if row.get("fastest"))
        if not table:
            raise ValueError("no row is marked as the fastest")
        return table
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a table of kernel configurations, got {type(error).__name__}: {error}; "
            f"write one by `python -m dma_kernels.tune --out {path}`, or set DMA_KERNEL_CONFIGS=builtin"
        ) from error


def _entry(row: dict[str, Any]) -> tuple[tuple[Kernel, int, int], KernelConfig]:
    """One row of a file, checked."""
    where, config = (row["kernel"], row["element_bytes"], row["head_dim"]), KernelConfig(*row["config"])
    if where not in BUILTIN:
        raise ValueError(f"expected a kernel of {list(get_args(Kernel))}, 2 or 4 bytes, head dim 64, 128 or 256: {row}")
    tiles, warps = [1 << i for i in range(4, 11)], [1 << i for i in range(6)]
    allowed = (tiles, tiles, warps, range(1, 9), [None, *range(32, 256, 8)])
    if any(type(x) is float or x not in values for x, values in zip(config, allowed, strict=True)):
        raise ValueError(
            "expected tiles of 16 to 1024, up to 32 warps (powers of two), up to 8 stages, "
            f"and null or 32 to 248 registers (in steps of 8): {row}"
        )
    return where, config
