"""Time of the three attention kernels by tile, warps and pipeline stages: where their configurations come from.

    python benchmarks/tune_kernels.py      a JSON file under benchmarks/results/

16 query and 4 KV heads, N = 32k, w = 1024, bfloat16, random ranks. Kernels are compiled by several processes first.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from environment import describe
from gpu_attention import time_ms
from gpu_kernels import make_inputs
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dma_kernels import Lifetimes, SegmentSlots
from dma_kernels.triton_forward import launch_forward
from dma_kernels.triton_gather import launch_gather_rows
from dma_kernels.triton_key_gradients import launch_key_gradients
from dma_kernels.triton_query_gradients import launch_query_gradients

# Rows (keys for "key gradients") and slots (queries) of a tile, warps, stages.
CONFIGS = {
    "forward": [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
    "query gradients": [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3)],
    "key gradients": [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
}
Case = tuple[str, int, tuple[int, int, int, int]]
CASES: list[Case] = [(name, head_dim, c) for head_dim in (64, 128) for name in CONFIGS for c in CONFIGS[name]]


def make_arguments(head_dim: int) -> dict[str, Tensor | int]:
    """Queries, keys in segment order, and where these live."""
    q, k, v, ranks = (x.detach() for x in make_inputs(16, 4, 32768, head_dim))
    slots = SegmentSlots.of(Lifetimes.top_w(ranks, 1024), 1, 4)
    k, v, bias = (launch_gather_rows(x, slots.copies.row, slots.filled_length) for x in (k, v, ranks[..., None]))
    return {"q": q, "k": k, "v": v, "bias": bias.squeeze(-1), "birth": slots.birth, "death": slots.death}


def launcher(case: Case, arguments: dict[str, Tensor]) -> Callable[[], object]:
    """One kernel with one configuration; the time does not depend on the numbers."""
    name, head_dim, config = case
    rest = {"segment_length": 1024, "scale": head_dim**-0.5, "config": config}
    grad, lse = torch.randn_like(arguments["q"]), torch.full(arguments["q"].shape[:3], 12.0, device="cuda")
    if name == "forward":
        return lambda: launch_forward(**arguments, **rest)
    if name == "query gradients":
        return lambda: launch_query_gradients(**arguments, lse=lse, out=grad, grad_out=grad, **rest)
    return lambda: launch_key_gradients(**arguments, lse=lse, delta=lse, grad_out=grad, **rest)


def compile_case(case: Case) -> str | None:
    """Fill Triton's cache on disk; what went wrong, if a configuration does not fit the GPU."""
    try:
        launcher(case, make_arguments(case[1]))()
    except OutOfResources as error:
        return str(error)
    return None


def main() -> None:
    """Compile, measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tune_kernels.json")
    args = parser.parse_args()
    with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = dict(zip(CASES, pool.map(compile_case, CASES), strict=True))
    arguments, rows = {head_dim: make_arguments(head_dim) for head_dim in (64, 128)}, []
    for case in CASES:
        row = {"kernel": case[0], "head_dim": case[1], "config": case[2]}
        row |= {"error": errors[case]} if errors[case] else {"ms": time_ms(launcher(case, arguments[case[1]]))}
        rows.append(row)
        print(row, flush=True)
    args.out.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
