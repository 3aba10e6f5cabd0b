"""The summary of speed in README, made from the result files of other benchmarks."""

from harness import Part, Result, Table

RESULTS = ["gpu_kernels", "gpu_fit_80m", "gpu_fit_1.7b", "gpu_drift", "gpu_decode"]
GRAPH = "triton, CUDA graph"
SHAPES = ((32, 8192, 1024), (32, 32_768, 1024), (16, 131_072, 2048))  # query heads, length, keys per query
LENGTHS = (4096, 16_384, 32_768)  # of the sequences that whole models are trained on


def tables(kernels: Result, small: Result, large: Result, forms: Result, decode: Result) -> list[Part]:
    """A table with a row for each shape, its caption, and a few sentences about whole models and decoding."""
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
    """Speed of training with `dma` as a multiple of that with `mha`, for each length, in words."""
    rate = {(row["attention"], row["length"]): row["tokens_per_s"][1] for row in result["steps"]}
    *first, last = (f"{rate['dma', length] / rate['mha', length]:.2f}" for length in LENGTHS)
    return f"{', '.join(first)} and {last}"


def speeds_of(form: str, result: Result) -> str:
    """Speed of training in a form as a multiple of that with `mha`, for each length, in words."""
    mha, ours = ({x["length"]: x["step_ms"][1] for x in result["training"] if x["form"] == y} for y in ("mha", form))
    return " and ".join(f"{mha[length] / ours[length]:.2f}" for length in ours)
