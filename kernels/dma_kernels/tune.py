"""Find the fastest tiles, warps, stages and registers of the attention kernels on this GPU, and write them to a file.

    python -m dma_kernels.tune      takes a few minutes; later processes on such a GPU find the file

The measurement uses 16 query and 4 KV heads, N = 32k (8k in float32), w = 1024 and random ranks. First, several
processes compile all kernels. `attention/configs.py` says where the file is kept, and how to choose another one.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_args

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dma_kernels.attention.configs import Kernel, KernelConfig, tuned_file
from dma_kernels.attention.kernels.forward import launch_forward
from dma_kernels.attention.kernels.key_gradients import StoredScores, key_tile, launch_key_gradients
from dma_kernels.attention.kernels.query_gradients import launcher_of_query_gradients, list_key_tiles
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.segments.gather_kernels import launch_gather_keys
from dma_kernels.segments.slots import SegmentSlots

_WINDOW = 1024
_CONFIGS: dict[int, list[tuple[int, ...]]] = {  # by element size in bytes
    2: [
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (64, 64, 8, 2),
        (32, 32, 4, 2),
        (64, 32, 4, 2, 168),
        (64, 64, 4, 2, 168),
        (128, 32, 8, 2, 128),
        (128, 64, 8, 2, 128),
        (128, 128, 8, 2, 128),
    ],
    4: [(64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 1), (16, 16, 4, 1)],
}
_OF_QUERY_GRADIENTS: dict[int, list[tuple[int, ...]]] = {  # columns: at most the rows of the key gradients
    2: [(64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4)],
    4: [(64, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2)],
}
_SHARE = 0.78  # maximum share of a thread's registers that accumulators may take


class Case(NamedTuple):
    """One kernel with one configuration, for one element size and head dim."""

    kernel: Kernel
    element_bytes: int
    head_dim: int
    config: KernelConfig


class Inputs(TypedDict):
    """Inputs of the kernels: queries, keys in segment order, and the lifetimes of the keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    birth: Tensor
    death: Tensor


def cases() -> list[Case]:
    """The cases to measure: those whose accumulators fit into registers."""
    every = (
        Case(kernel, size, head_dim, KernelConfig(*config))
        for size in _CONFIGS
        for head_dim in (64, 128, 256)
        for kernel in get_args(Kernel)
        for config in (_OF_QUERY_GRADIENTS if kernel == "query gradients" else _CONFIGS)[size]
    )
    return [case for case in every if _accumulators(case) <= _SHARE * (case.config.registers or 255)]


def _accumulators(case: Case) -> float:
    """The number of registers per thread that hold accumulators."""
    sums = 2 if case.kernel == "key gradients" else 1
    return sums * case.config.rows * case.head_dim / (32 * case.config.warps)


def make_arguments(element_bytes: int, head_dim: int) -> Inputs:
    """Random inputs with this element size and head dim, on the GPU."""
    torch.manual_seed(0)
    dtype, length = (torch.bfloat16, 32768) if element_bytes == 2 else (torch.float32, 8192)
    q, k, v = (
        torch.randn(1, length, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for heads in (16, 4, 4)
    )
    ranks = torch.randn(1, 4, length, device="cuda")
    slots = SegmentSlots.of(Lifetimes.top_w(ranks, _WINDOW), 1, 4)
    k, v, bias, _ = launch_gather_keys(k, v, ranks, None, slots.copies.row, segment_length=slots.segment_length)
    return {"q": q, "k": k, "v": v, "bias": bias, "birth": slots.birth, "death": slots.death}


def launcher(case: Case, arguments: Inputs) -> Callable[[], object]:
    """A function that launches the kernel of a case; its time does not depend on the values of the inputs."""
    rest: dict[str, Any] = {"scale": case.head_dim**-0.5, "segment_length": _WINDOW, "config": case.config}
    grad, lse = torch.randn_like(arguments["q"]), torch.full(arguments["q"].shape[:3], 12.0, device="cuda")
    if case.kernel == "forward":
        return lambda: launch_forward(**arguments, **rest)
    if case.kernel == "query gradients":
        return _query_gradients(case, arguments)
    return lambda: launch_key_gradients(**arguments, lse=lse, delta=lse, grad_out=grad, **rest)


def _query_gradients(case: Case, arguments: Inputs) -> Callable[[], object]:
    """A function that launches the query gradients, for dS of half of the segments."""
    q, k, birth, death = (arguments[name] for name in ("q", "k", "birth", "death"))
    keys, half = k.shape[2], len(k) // 2
    lists = list_key_tiles(birth, death, q, _WINDOW, key_tile=key_tile(q, keys), config=case.config)
    ds = q.new_zeros(half * k.shape[1] * keys, q.shape[1] // k.shape[1] * _WINDOW)
    launch = launcher_of_query_gradients(
        k, lists, torch.empty_like(q), scale=case.head_dim**-0.5, segment_length=_WINDOW
    )
    return lambda: launch(StoredScores(ds, 0, half * k.shape[1]))


def compile_case(case: Case) -> str | None:
    """Compile a case into Triton's cache on disk, or return the error if its configuration does not fit the GPU."""
    try:
        launcher(case, make_arguments(case.element_bytes, case.head_dim))()
    except (OutOfResources, torch.OutOfMemoryError) as error:
        return str(error)
    return None


def measure(case: Case, error: str | None) -> dict[str, Any]:
    """A row of the file: the case, with its median time in milliseconds or its error."""
    row: dict[str, Any] = case._asdict()
    if error:
        return row | {"error": error}
    launch = launcher(case, make_arguments(case.element_bytes, case.head_dim))
    return row | {"ms": triton.testing.do_bench(launch, return_mode="median")}


def mark_fastest(rows: list[dict[str, Any]]) -> None:
    """Mark the fastest row of each kernel, element size and head dim."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (row for row in rows if "ms" in row):
        where = row["kernel"], row["element_bytes"], row["head_dim"]
        best[where] = min(best.get(where, row), row, key=lambda x: x["ms"])
    for row in best.values():
        row["fastest"] = True


def main() -> None:
    """Compile, measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write to this file instead; name it in DMA_KERNEL_CONFIGS")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA GPU to measure on, got none; run this on a machine that has one")
    todo = cases()
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = list(pool.map(compile_case, todo))
    rows = []
    for case, error in zip(todo, errors, strict=True):
        rows.append(measure(case, error))
        print(rows[-1], flush=True)
    mark_fastest(rows)
    gpu = torch.cuda.get_device_name()
    out = args.out or tuned_file(gpu)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"gpu": gpu, "torch": torch.__version__, "triton": version("triton"), "rows": rows}
    partial = out.with_suffix(f".{os.getpid()}.partial")  # other processes may write at the same time
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
