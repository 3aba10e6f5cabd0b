"""How fast dynamic mask attention is, in the few figures of README, of what other benchmarks have measured."""

from typing import Any

from harness import Part, Table

RESULTS = ["gpu_kernels", "gpu_fit_80m", "gpu_fit_1.7b", "gpu_decode"]
SHAPES = ((32, 8192, 1024), (32, 32_768, 1024), (16, 131_072, 2048))  # query heads, length, keys of a query
LENGTHS = (4096, 16_384, 32_768)  # of the sequences that whole models train on


def tables(kernels: dict[str, Any], small: dict[str, Any], large: dict[str, Any], decode: dict[str, Any]) -> list[Part]:
    """One row for each shape, what was measured, and whole models and decoding in a sentence each."""
    rows = {(row["heads"], row["length"], row["window"]): row for row in kernels["attention"]}
    times = [(shape, *(rows[shape][name][1] for name in ("triton", "cuDNN"))) for shape in SHAPES]
    step = next(row for row in decode["steps"] if row["batch"] == 1)["triton"][1]
    dense = next(row for row in decode["dense"] if (row["batch"], row["length"]) == (1, 131_072))["cuDNN"][1]
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
        f"*Time of a forward and backward pass of one attention layer on an {kernels['environment']['gpu']}; lower is\n"
        "better. Selection included, bfloat16, head dim 128, 32 query and 8 KV heads (16 and 4 in the last row),\n"
        "`triton` backend.*",
        f"Whole models train at {speeds(small)} times the speed of full attention at 4k, 16k and 32k tokens\n"
        f"(80M parameters), and at {speeds(large)} times with 1.7B. A decoding step of one layer takes {step:.0f} µs\n"
        f"at any length; dense attention takes {dense:.0f} µs at 128k. See [all measurements](docs/benchmarks.md).",
    ]


def speeds(result: dict[str, Any]) -> str:
    """How many times as many tokens per second as `mha` the model trains on with `dma`, by length."""
    rate = {(row["attention"], row["length"]): row["tokens_per_s"][1] for row in result["steps"]}
    *first, last = (f"{rate['dma', length] / rate['mha', length]:.2f}" for length in LENGTHS)
    return f"{', '.join(first)} and {last}"
