"""Time and memory of the attention backends on a CPU, forward and backward, selection included.

    python benchmarks/cpu_attention.py                       the whole table
    python benchmarks/cpu_attention.py --worker torch 4096   one measurement in this process, as JSON

`torch` and `reference` compute dynamic mask attention; `sdpa` is dense causal attention by PyTorch, the strongest
dense baseline on a CPU. Each row is the median over several subprocesses. Peak memory is how much a process grows
beyond its size before the first call. Before anything is timed, `torch` must equal `reference`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dma_kernels import Lifetimes, reference_attention, reference_mask, segment_attention
from harness import CommandLine, Part, Result, Row, Table, describe, record, spread
from harness.inputs import dense, make_inputs
from harness.tables import cpu_of, interval

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 64, 256
LENGTHS = (1024, 2048, 4096, 8192, 16384)
LONGEST = {"torch": 16384, "sdpa": 16384, "reference": 8192}


def torch_backend(q: Tensor, k: Tensor, v: Tensor, ranks: Tensor) -> Tensor:
    """Dense matmuls per segment, linear in N."""
    return segment_attention(q, k, v, ranks.exp(), Lifetimes.top_w(ranks, WINDOW))


def reference_backend(q: Tensor, k: Tensor, v: Tensor, ranks: Tensor) -> Tensor:
    """The O(N²) definition."""
    return reference_attention(q, k, v, ranks.exp(), reference_mask(ranks, WINDOW))


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor, ranks: Tensor) -> Tensor:
    """Dense causal attention; the ranks do not matter."""
    return dense(q, k, v) + 0 * ranks.sum()


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "torch": torch_backend,
    "sdpa": sdpa_backend,
    "reference": reference_backend,
}


inputs_of = partial(make_inputs, HEADS, KV_HEADS, head_dim=HEAD_DIM, device="cpu", dtype=torch.float32)


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; Linux only."""
    # Not getrusage: its maximum starts at that of the parent process.
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure(backend: str, length: int) -> dict[str, float]:
    """Forward and backward seconds of the second of two calls, and their peak memory."""
    inputs, function = inputs_of(length), BACKENDS[backend]
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
    inputs = inputs_of(1000)
    results = []
    for function in (torch_backend, reference_backend):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def measure_apart(backend: str, length: int, repeats: int) -> dict[str, list[float]]:
    """Measure in separate processes; minimum, median and maximum of each figure."""
    command = [sys.executable, __file__, "--worker", backend, str(length)]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)]
    return {name: spread(run[name] for run in runs) for name in runs[0]}


def measure_all(lengths: list[int], repeats: int) -> Iterator[Row]:
    """One row by backend and length."""
    for backend, most in LONGEST.items():
        for length in lengths:
            if length <= most:
                yield {"backend": backend, "length": length, **measure_apart(backend, length, repeats)}


def tables(result: Result) -> list[Part]:
    """What the pages show: time and memory by backend and length."""
    shape = result["shape"]
    return [
        Table(
            result["rows"],
            "**`make bench`**: time of forward and backward passes of attention on a CPU, and peak memory; lower is "
            f"better. `sdpa` is PyTorch's dense causal attention. float32, batch 1, {shape['heads']} query and "
            f"{shape['kv_heads']} KV heads, head dim {shape['head_dim']}, w = {shape['window']}, selection included; "
            f"median [min - max] of separate processes ({cpu_of(result)}).",
            ["", "N", "forward ms", "backward ms", "peak MB"],
            lambda row: [
                f"`{row['backend']}`",
                row["length"],
                *(interval(row[name], 1e-3, ".0f") for name in ("forward_s", "backward_s")),
                f"{row['peak_mb'][1]:.0f}",
            ],
        )
    ]


def main() -> None:
    """Check, measure, print, and write the JSON file after each row."""
    line = CommandLine(__doc__, "cpu_attention", duration="about ten minutes on two cores")
    line.add_argument("--worker", nargs=2, metavar=("BACKEND", "LENGTH"), help="measure once in this process")
    line.add_argument("--repeats", type=int, default=5, help="processes per row (default: 5)")
    line.add_lengths(LENGTHS)
    args = line.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], int(args.worker[1]))))
        return
    check()
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "window": WINDOW, "dtype": "float32"}
    result = {"environment": describe(), "shape": shape}
    record(args.out, result, {"rows": measure_all(args.lengths, args.repeats)}, tables)


if __name__ == "__main__":
    main()
