"""Time and memory of the attention backends on a CPU, forward and backward, selection included.

    python benchmarks/cpu_attention.py                  the whole table, and a JSON file under benchmarks/results/
    python benchmarks/cpu_attention.py --worker torch 4096   one measurement in this process, as JSON

`torch` and `reference` compute dynamic mask attention; `sdpa` is dense causal attention by PyTorch, the strongest
dense baseline on a CPU. Every row is the median of repeated subprocesses; peak memory is what the process needs
above its size before the first call. Before anything is timed, `torch` must equal `reference`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import describe
from torch import Tensor

from dma_kernels import Lifetimes, reference_attention, reference_mask, segment_attention

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 64, 256
LENGTHS = {
    "torch": (1024, 2048, 4096, 8192, 16384),
    "sdpa": (1024, 2048, 4096, 8192, 16384),
    "reference": (1024, 2048, 4096, 8192),
}


def torch_backend(q: Tensor, k: Tensor, v: Tensor, ranks: Tensor) -> Tensor:
    """Dense matmuls per segment, linear in N."""
    return segment_attention(q, k, v, ranks.exp(), Lifetimes.top_w(ranks, WINDOW))


def reference_backend(q: Tensor, k: Tensor, v: Tensor, ranks: Tensor) -> Tensor:
    """The O(N²) definition."""
    return reference_attention(q, k, v, ranks.exp(), reference_mask(ranks, WINDOW))


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor, ranks: Tensor) -> Tensor:
    """Dense causal attention; the ranks do not matter."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) + 0 * ranks.sum()


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "torch": torch_backend,
    "sdpa": sdpa_backend,
    "reference": reference_backend,
}


def make_inputs(length: int) -> list[Tensor]:
    """Random q, k, v and ranks, float32, that require grad."""
    torch.manual_seed(0)
    shapes = [(1, HEADS, length, HEAD_DIM), (1, KV_HEADS, length, HEAD_DIM), (1, KV_HEADS, length, HEAD_DIM)]
    return [torch.randn(shape).requires_grad_() for shape in [*shapes, (1, KV_HEADS, length)]]


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; Linux only."""
    # Not getrusage: its maximum starts with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure(backend: str, length: int) -> dict[str, float]:
    """Forward and backward seconds of a second call, and the memory that both need."""
    inputs, function = make_inputs(length), BACKENDS[backend]
    before = peak_memory()
    for _ in range(2):
        start = time.perf_counter()
        out = function(*inputs)
        middle = time.perf_counter()
        torch.autograd.grad(out.sum(), inputs)
        end = time.perf_counter()
        del out
    return {"forward_s": middle - start, "backward_s": end - middle, "peak_mb": (peak_memory() - before) / 2**20}


def check() -> None:
    """`torch` equals `reference` in output and gradients."""
    inputs = make_inputs(1000)
    results = []
    for function in (torch_backend, reference_backend):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def measure_apart(backend: str, length: int, repeats: int) -> dict[str, list[float]]:
    """Measurements in processes of their own: min, median, max of each figure."""
    command = [sys.executable, __file__, "--worker", backend, str(length)]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)]
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {name: [min(values), statistics.median(values), max(values)] for name, values in columns.items()}


def main() -> None:
    """Check, measure, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "LENGTH"), help="measure once in this process")
    parser.add_argument("--repeats", type=int, default=5, help="processes per row")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_attention.json")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], int(args.worker[1]))))
        return

    check()
    environment = describe()
    print(f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}")
    print(f"float32, batch 1, {HEADS} query and {KV_HEADS} KV heads, head dim {HEAD_DIM}, w = {WINDOW}")
    print("median [min - max] of", args.repeats, "processes\n")
    print("| backend | N | forward ms | backward ms | peak MB |\n| --- | ---: | ---: | ---: | ---: |")
    rows = []
    for backend, lengths in LENGTHS.items():
        for length in lengths:
            figures = measure_apart(backend, length, args.repeats)
            rows.append({"backend": backend, "length": length, **figures})
            cells = [f"{1e3 * b:.0f} [{1e3 * a:.0f} - {1e3 * c:.0f}]" for a, b, c in list(figures.values())[:2]]
            print(f"| {backend} | {length} | {cells[0]} | {cells[1]} | {figures['peak_mb'][1]:.0f} |", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "window": WINDOW, "dtype": "float32"}
    args.out.write_text(json.dumps({"environment": environment, "shape": shape, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
