"""The three rows of README that say how fast dynamic mask attention is, of what `gpu_kernels.py` has measured."""

from typing import Any

from harness import Part, Table

RESULTS = ["gpu_kernels"]
SHAPES = ((32, 8192, 1024), (32, 32_768, 1024), (16, 131_072, 2048))  # query heads, length, keys of a query


def tables(result: dict[str, Any]) -> list[Part]:
    """One row for each shape, and what was measured below it."""
    rows = {(row["heads"], row["length"], row["window"]): row for row in result["attention"]}
    times = [(shape, *(rows[shape][name][1] for name in ("triton", "cuDNN"))) for shape in SHAPES]
    return [
        Table(
            [
                (f"{length:,}", f"{window:,}", f"{ours:.3g} ms", f"{dense:.3g} ms", f"{dense / ours:.1f}x")
                for (_, length, window), ours, dense in times
            ],
            "",
            ["sequence", "keys per query", "DMA", "dense attention (cuDNN)", "speedup"],
            labels=0,
        ),
        f"*Forward and backward pass of one attention layer on an {result['environment']['gpu']}, selection included:\n"
        "bfloat16, head dim 128, 32 query and 8 KV heads (16 and 4 in the last row), `triton` backend. See\n"
        "[all measurements](docs/benchmarks.md).*",
    ]
