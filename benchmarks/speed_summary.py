"""How fast dynamic mask attention is, in the few figures of README, of what other benchmarks have measured."""

from harness import Part, Result, Table

RESULTS = ["gpu_kernels", "gpu_fit_80m", "gpu_fit_1.7b", "gpu_drift", "gpu_decode"]
GRAPH = "triton, CUDA graph"
SHAPES = ((32, 8192, 1024), (32, 32_768, 1024), (16, 131_072, 2048))  # query heads, length, keys of a query
LENGTHS = (4096, 16_384, 32_768)  # of the sequences that whole models train on


def tables(kernels: Result, small: Result, large: Result, forms: Result, decode: Result) -> list[Part]:
    """One row for each shape, what was measured, and whole models and decoding in a few sentences."""
    rows = {(row["heads"], row["length"], row["window"]): row for row in kernels["attention"]}
    times = [(shape, *(rows[shape][name][1] for name in ("triton", GRAPH, "cuDNN"))) for shape in SHAPES]
    step = next(row for row in decode["steps"] if row["batch"] == 1)["triton"][1]
    dense = next(row for row in decode["dense"] if (row["batch"], row["length"]) == (1, 131_072))["cuDNN"][1]
    return [
        Table(
            [
                (
                    f"{length:,}",
                    f"{window:,}",
                    f"{ours:.3g} ms",
                    f"{graph:.3g} ms",
                    f"{other:.3g} ms",
                    f"{other / graph:.1f}x",
                )
                for (_, length, window), ours, graph, other in times
            ],
            "",
            ["sequence", "keys per query", "DMA", "DMA in a CUDA graph", "dense attention (cuDNN)", "speedup (graph)"],
            labels=0,
        ),
        f"*Time of a forward and backward pass of one attention layer on an {kernels['environment']['gpu']}; lower is\n"
        "better. DMA in its published form, selection included; `triton` backend, bfloat16, head dim 128, 32 query\n"
        "and 8 KV heads (16 and 4 in the last row). At 8k, the CPU takes longer to launch the kernels than the GPU to\n"
        "run them; a CUDA graph removes that cost.*",
        f"Whole models in this form train at {speeds(small)} times the speed of full attention at 4k, 16k and 32k\n"
        f"tokens (80M parameters), and at {speeds(large)} times with 1.7B. The shipped configs train\n"
        "[another form](#how-it-works), which learns better and costs more. In 27.5 % of its training steps, queries\n"
        f"see all keys. The 80M model takes these steps at {speeds_of('all keys', forms)} times the speed of full\n"
        f"attention at 4k and 32k, and all other steps at {speeds_of('shipped', forms)} times.",
        f"A decoding step of one layer takes {step:.0f} µs at any length; dense attention takes {dense:.0f} µs at\n"
        "128k. See [all measurements](docs/benchmarks.md).",
    ]


def speeds(result: Result) -> str:
    """How many times as many tokens per second as `mha` the model trains on with `dma`, by length."""
    rate = {(row["attention"], row["length"]): row["tokens_per_s"][1] for row in result["steps"]}
    *first, last = (f"{rate['dma', length] / rate['mha', length]:.2f}" for length in LENGTHS)
    return f"{', '.join(first)} and {last}"


def speeds_of(form: str, result: Result) -> str:
    """How many times as fast as with `mha` the model trains in a form, by length."""
    mha, ours = ({x["length"]: x["step_ms"][1] for x in result["training"] if x["form"] == y} for y in ("mha", form))
    return " and ".join(f"{mha[length] / ours[length]:.2f}" for length in ours)
