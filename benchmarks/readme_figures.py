"""Write the figures of README.md and docs/ from the files in benchmarks/results: `python benchmarks/readme_figures.py`.

They stand in any page between `<!-- figures: benchmarks/NAME.py -->` and `<!-- end of figures -->`.
"""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = r"<!-- figures: benchmarks/(\w+)\.py -->", "<!-- end of figures -->"
SECTION = re.compile(rf"^({BEGIN}\n\n).*?(\n\n{END})$", re.DOTALL | re.MULTILINE)
MADE_BY = {"make train": "train_seeds", "make mqar": "train_seeds", "make bench": "cpu_attention"}


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def machine(result: dict[str, Any]) -> str:
    """Hardware and versions of a result, in words."""
    e = result["environment"]
    return f"{e['cpu']}, {e['threads']} threads, Python {e['python']}, torch {e['torch']}, commit {e['commit']}"


def text_lines() -> list[str]:
    """The default corpus of each Python version."""
    lines = [
        "| corpus: help topics of | seed | bits per byte at start | at end | seconds in all |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for version in ("3.11", "3.12", "3.13"):
        for run in load(f"train_text_{version}")["runs"]:
            cells = (str(run["seed"]), f"{run['start']:.2f}", f"{run['curve'][-1][1]:.3f}", f"{run['seconds']:.0f}")
            lines.append(f"| Python {version} | {' | '.join(cells)} |")
    return lines


def mqar_lines() -> list[str]:
    """Accuracy by seed."""
    runs = load("train_mqar")["runs"]
    steps = [step for step, _ in runs[0]["curve"]]
    lines = [f"| seed | {' | '.join(f'step {step}' for step in steps)} |", "| --- |" + " ---: |" * len(steps)]
    for run in runs:
        cells = " | ".join(f"{100 * value:.2f} %" for _, value in run["curve"])
        lines.append(f"| {run['seed']} | {cells} |")
    return lines


def attention_lines() -> list[str]:
    """Milliseconds and memory by backend and length."""
    lines = ["| | N | forward ms | backward ms | peak MB |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in load("cpu_attention")["rows"]:
        times = [[f"{1e3 * x:.0f}" for x in row[name]] for name in ("forward_s", "backward_s")]
        cells = " | ".join(f"{b} [{a} - {c}]" for a, b, c in times)
        lines.append(f"| `{row['backend']}` | {row['length']} | {cells} | {row['peak_mb'][1]:.0f} |")
    return lines


def spread(times: list[float]) -> str:
    """Median [min - max] in milliseconds."""
    low, middle, high = (f"{t:.3g}" for t in times)
    return f"{middle} [{low} - {high}]"


def gpu_machine(result: dict[str, Any]) -> str:
    """GPU and versions of a result, in words."""
    e = result["environment"]
    return f"{e['gpu']}, CUDA {e['cuda']}, torch {e['torch']}, Triton {e['triton']}, commit {e['commit']}"


def gpu_attention_lines() -> list[str]:
    """Forward and backward by shape, and how much faster than the fastest dense attention."""
    lines = [
        "| heads, N, w | | `flex` | cuDNN | FlashAttention-2 | FlexAttention, natural order | `flex` against cuDNN |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = ("flex", "cuDNN", "FlashAttention-2", "flex, natural order")
    for row in load("gpu_attention")["attention"]:
        shape = f"{row['heads']}/{row['kv_heads']}, {row['length'] // 1024}k, {row['window']}"
        for part in ("forward", "backward"):
            cells = " | ".join(spread(row[name][part]) for name in names)
            lines.append(f"| {shape} | {part} | {cells} | {row['cuDNN'][part][1] / row['flex'][part][1]:.1f}x |")
        ours, dense = (sum(row[name][part][1] for part in ("forward", "backward")) for name in ("flex", "cuDNN"))
        lines.append(f"| {shape} | both | {ours:.3g} | {dense:.3g} | | | {dense / ours:.1f}x |")
        selection, plan = row["selection"]["forward"], row["plan"]["forward"]
        with_both = dense / (ours + selection[1] + plan[1])
        lines.append(f"| {shape} | selection; plan | {spread(selection)}; {spread(plan)} | | | | {with_both:.1f}x |")
    return lines


def kernel_lines() -> list[str]:
    """Forward and backward of all backends, everything included, and how much faster than dense attention."""
    names = ("triton", "triton, CUDA graph", "flex", "cuDNN", "FlashAttention-2")
    lines = [
        "| heads, N, w | `triton` | as a CUDA graph | `flex` | cuDNN | FlashAttention-2 | `triton` against cuDNN |"
    ]
    lines.append("| --- |" + " ---: |" * 6)
    for row in load("gpu_kernels")["attention"]:
        shape = f"{row['heads']}/{row['kv_heads']}, {row['length'] // 1024}k, {row['window']}"
        cells = " | ".join(spread(row[name]) for name in names)
        eager, graph = (row["cuDNN"][1] / row[name][1] for name in names[:2])
        lines.append(f"| {shape} | {cells} | {eager:.1f}x, graph {graph:.1f}x |")
    return lines


def part_lines() -> list[str]:
    """Milliseconds of every part, and the rates of the attention kernels."""
    rows = load("gpu_kernels")["parts"]
    names = [f"w = {row['window']}, head dim {row['head_dim']}" for row in rows]
    lines = ["| 16/4 heads, 32k | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(rows)]
    lines += [f"| {part} | {' | '.join(spread(row['parts'][part]) for row in rows)} |" for part in rows[0]["parts"]]
    for name in ("forward TFLOP/s", "backward TFLOP/s"):
        lines.append(f"| {name}, live pairs only | {' | '.join(f'{row[name]:.0f}' for row in rows)} |")
    return lines


def process_lines() -> list[str]:
    """Milliseconds by the kind of ranks."""
    rows = load("gpu_kernels")["processes"]
    lines = [f"| {' | '.join(row['ranks'] for row in rows)} |", "|" + " ---: |" * len(rows)]
    return [*lines, f"| {' | '.join(spread(row['ms']) for row in rows)} |"]


def length_lines() -> list[str]:
    """Milliseconds and memory by length."""
    lines = ["| N | forward + backward ms | selection ms | as a CUDA graph | plan ms | as a CUDA graph | peak GiB |"]
    lines.append("| --- |" + " ---: |" * 6)
    names = ("ms", "selection", "selection, CUDA graph", "plan", "plan, CUDA graph")
    for row in load("gpu_kernels")["lengths"]:
        cells = " | ".join(spread(row[name]) for name in names)
        lines.append(f"| {row['length'] // 1024}k | {cells} | {row['train_gib']:.2f} |")
    return lines


def peer_lines() -> list[str]:
    """Milliseconds beside flash-sparse-attn's compact kernel."""
    lines = ["| N, w | | `triton` | flash-sparse-attn, compact | |", "| --- | --- | ---: | ---: | ---: |"]
    for row in load("gpu_peer")["peer"]:
        for part, end in (("forward", ", forward"), ("forward + backward", "")):
            ours, theirs = row[f"triton{end}"], row[f"compact{end}"]
            shape = f"{row['length'] // 1024}k, {row['window']}"
            lines.append(f"| {shape} | {part} | {spread(ours)} | {spread(theirs)} | {theirs[1] / ours[1]:.1f}x |")
    return lines


def decode_lines() -> list[str]:
    """Milliseconds per token and megabytes by length and cache."""
    lines = [
        "| tokens read | small cache, ms per token | MB | full cache, ms per token | MB |",
        "| ---: |" + " ---: |" * 4,
    ]
    rows = load("cpu_decode")["decode"]
    for small, full in zip(rows[::2], rows[1::2], strict=True):
        cells = " | ".join(f"{spread(row['ms'])} | {row['mb']:.2f}" for row in (small, full))
        lines.append(f"| {small['length'] // 1024}k | {cells} |")
    return lines


def gpu_step_lines() -> list[str]:
    """Microseconds of a step by batch, beside dense attention to a full cache."""
    result = load("gpu_decode")
    dense = {(row["batch"], row["length"]): row for row in result["dense"]}
    lengths = sorted({length for _, length in dense})
    lines = [
        "| batch | `triton` | plain PyTorch | FlashAttention-2, w keys | "
        + " | ".join(f"cuDNN, {length // 1024}k keys" for length in lengths)
        + " |"
    ]
    lines.append("| ---: |" + " ---: |" * (3 + len(lengths)))
    for row in result["steps"]:
        names = ("triton", "torch", "FlashAttention-2, w keys")
        cells = [spread(row[name]) for name in names]
        for length in lengths:
            full = dense.get((row["batch"], length))
            cells.append("" if full is None else f"{full['cuDNN'][1]:.0f} ({full['cuDNN'][1] / row['triton'][1]:.0f}x)")
        lines.append(f"| {row['batch']} | {' | '.join(cells)} |")
    return lines


def gpu_context_lines() -> list[str]:
    """Time of a step, of a whole model's token, and memory, by the length of what has been read."""
    result = load("gpu_decode")
    lines = ["| tokens read | a layer's step, us | MiB | a token, eagerly, ms | as a CUDA graph, ms | MiB |"]
    lines.append("| ---: |" + " ---: |" * 5)
    for layer, model in zip(result["contexts"], result["model"], strict=True):
        cells = (f"{layer['length'] // 1024}k", spread(layer["us"]), f"{layer['mib']:.2f}", spread(model["eager"]))
        lines.append(f"| {' | '.join(cells)} | {spread(model['CUDA graph'])} | {model['mib']:.0f} |")
    return lines


def mask_lines() -> list[str]:
    """Milliseconds to build a block mask, by length."""
    names = ("block_mask, eager", "block_mask, compiled", "create_block_mask, compiled")
    lines = ["| N | `block_mask`, eager | `block_mask`, compiled | `create_block_mask`, compiled | |"]
    lines.append("| --- |" + " ---: |" * 4)
    for row in load("gpu_attention")["masks"]:
        cells = " | ".join(spread(row[name]) for name in names)
        lines.append(f"| {row['length'] // 1024}k | {cells} | {row[names[2]][1] / row[names[1]][1]:.1f}x |")
    return lines


def bias_lines() -> list[str]:
    """Ways to the gradient of the key biases."""
    lines = ["| | forward | backward |", "| --- | ---: | ---: |"]
    for row in load("gpu_attention")["bias_gradients"]:
        forward = spread(row["forward"]) if "forward" in row else ""
        lines.append(f"| {row['way']} | {forward} | {spread(row['backward'])} |")
    return lines


def memory_lines() -> list[str]:
    """Peak memory by length."""
    rows = load("gpu_attention")["memory"]
    names = [f"{row['length'] // 1024}k" for row in rows[:-1]] + ["1M, forward only"]
    cells = [f"{row.get('train_gib', row.get('forward_gib')):.2f}" for row in rows]
    return [f"| N | {' | '.join(names)} |", "| --- |" + " ---: |" * len(rows), f"| GiB | {' | '.join(cells)} |"]


def step_lines() -> list[str]:
    """Training steps of whole models by shape, length and attention."""
    names = list(dict.fromkeys(row["attention"] for row in load("gpu_mixers")["steps"]))
    lines = [f"| model, N | {' | '.join(f'`{name}`' for name in names)} |", "| --- |" + " ---: |" * len(names)]
    cells: dict[str, list[str]] = {}
    for row in load("gpu_mixers")["steps"]:
        if "ms" in row:
            low, middle, high = (f"{ms:,.0f}" for ms in row["ms"])
            cell = f"{middle} [{low} - {high}], {row['peak_gib']:.0f} GiB"
        else:
            cell = "failed"
        cells.setdefault(f"{row['shape']}, {row['length'] // 1024}k", []).append(cell)
    return lines + [f"| {case} | {' | '.join(row)} |" for case, row in cells.items()]


def fit_rows() -> list[dict[str, Any]]:
    """Training through the command line, all shapes."""
    return [row for shape in ("80m", "1.7b") for row in load(f"gpu_fit_{shape}")["steps"]]


def breakdown_lines() -> list[str]:
    """What a step's time goes into."""
    parts = (
        "attention",
        "selection",
        "projections",
        "MLP",
        "norms and rotary",
        "logits and loss",
        "optimizer",
        "other",
    )
    beside = {"data": "processor: data", "callbacks": "processor: callbacks"}
    heads = [*parts, "waiting", *beside.values(), "logging, once in 25 steps"]
    lines = [f"| | step | {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) + 1)]
    for row in fit_rows():
        times = [row["gpu_ms"].get(part, 0.0) for part in parts]
        times[-1] += row["gpu_ms"]["data"]
        times += [row["waiting_ms"], *(row["processor_ms"][part] for part in beside)]
        times.append(row["logging_ms"][1])
        cells = [f"{time:.1f}" for time in (row["step_ms"], *times)]
        lines.append(f"| {row['shape']}, {row['length'] // 1024}k, `{row['attention']}` | {' | '.join(cells)} |")
    return lines


def warm() -> str:
    """What the GPU does in the measured run."""
    row = next(row for row in fit_rows() if row["attention"] == "dma")
    return (
        f"in that, `dma` at 4k computes for {row['busy_ms']:.1f} ms of a step and waits for {row['waiting_ms']:.1f}, "
        f"at {row['watts']:.0f} of {row['most_watts']:.0f} W "
        f"and {row['clock_mhz']:.0f} of {row['largest_clock_mhz']:.0f} MHz"
    )


def overhead() -> str:
    """How much longer a step takes with all that makes a run visible."""
    turns = load("gpu_monitoring")["turns"]
    on, off = ([row["step_ms"] for row in turns if row["visible"] is which] for which in (True, False))
    times = [" and ".join(f"{time:.2f}" for time in row) for row in (on, off)]
    return f"{sum(on) / sum(off) - 1:.1%} ({times[0]} ms with, {times[1]} without)"


def fit_lines() -> list[str]:
    """Speed and utilisation of training through the command line."""
    lines = ["| model, N | `dma` | `mha` | speed of `dma` / `mha` |", "| --- |" + " ---: |" * 3]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in fit_rows():
        rows.setdefault(f"{row['shape']}, {row['length'] // 1024}k", {})[row["attention"]] = row
    for case, by_name in rows.items():
        cells = []
        for row in by_name.values():
            low, middle, high = (f"{rate / 1e3:.3g}" for rate in row["tokens_per_s"])
            cells.append(f"{middle} [{low} - {high}], {row['mfu'][1]:.1%}")
        dma, mha = (by_name[name]["tokens_per_s"][1] for name in ("dma", "mha"))
        lines.append(f"| {case} | {' | '.join(cells)} | {dma / mha:.2f}x |")
    return lines


def scaling_lines() -> list[str]:
    """Speed of each of several GPUs beside that of one."""
    runs = load("gpu_scaling")["runs"]
    one = {row["shape"]: row["tokens_per_s"][1] for row in runs if row["strategy"] == "one"}
    names = {"one": "one GPU", "ddp": "DDP", "fsdp": "FSDP2"}
    lines = [f"| model | {' | '.join(names.values())} |", "| --- |" + " ---: |" * len(names)]
    for shape, alone in one.items():
        cells = []
        for row in (row for name in names for row in runs if (row["shape"], row["strategy"]) == (shape, name)):
            low, middle, high = (f"{rate / 1e3:.3g}" for rate in row["tokens_per_s"])
            share = "" if row["strategy"] == "one" else f", {row['tokens_per_s'][1] / alone:.1%}"
            cells.append(f"{middle} [{low} - {high}]{share}, {row['peak_gib']:.0f} GiB")
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return lines


def block_lines() -> list[str]:
    """NSA's selected branch by kernels."""
    names = ("ours", "XL", "fla", "cuDNN", "FlashAttention-2")
    lines = ["| heads, N | | ours | native-sparse-attention-triton | fla | cuDNN, dense | FlashAttention-2, dense |"]
    lines.append("| --- | --- |" + " ---: |" * len(names))
    for row in load("gpu_block_attention")["selected"]:
        for part in ("forward", "backward"):
            cells = ["refuses" if isinstance(row[name], str) else spread(row[name][part]) for name in names]
            shape = f"{row['heads']}/{row['kv_heads']}, {row['length'] // 1024}k"
            lines.append(f"| {shape} | {part} | {' | '.join(cells)} |")
    return lines


def figures() -> str:
    """The whole section."""
    mqar, attention, text = load("train_mqar"), load("cpu_attention"), load("train_text_3.11")
    solved = sum(run["curve"][-1][1] >= 0.98 for run in mqar["runs"])
    shape, seconds = attention["shape"], [run["seconds"] for run in mqar["runs"]]
    gpu, live = load("gpu_attention"), load("decode_live_sets")
    gpu_shape = f"bfloat16, batch {gpu['shape']['batch']}, head dim {gpu['shape']['head_dim']}"
    kernels = gpu_machine(load("gpu_kernels"))
    parts = [
        "**`python benchmarks/gpu_kernels.py`**: milliseconds of forward and backward together, selection, plan, "
        "gathers and the gradient of the scores included, scores given; bfloat16, batch 1, head dim 128, random ranks; "
        f"median [min - max] of 3 ({kernels}).",
        "\n".join(kernel_lines()),
        "The parts by themselves (one gather or sum of three):",
        "\n".join(part_lines()),
        "Forward and backward at 32k, w = 1024, by the kind of ranks, milliseconds:",
        "\n".join(process_lines()),
        "By length, w = 1024, 16/4 heads:",
        "\n".join(length_lines()),
        "![Time by length](../benchmarks/figures/speed.png)",
        "**`python benchmarks/gpu_peer.py`**: beside the compact Triton kernel of flash-sparse-attn 1.2.3, which takes "
        "one set of w keys per head for the whole sequence (and so looks into the future, and is another model); "
        f"16/4 heads, selection included on both sides, milliseconds ({gpu_machine(load('gpu_peer'))}).",
        "\n".join(peer_lines()),
        "**`python benchmarks/gpu_attention.py`**: milliseconds of forward and backward given selection and plan, "
        "gathers and the gradient of the scores included, and of these two beside (the last line of each shape counts "
        f"them in); cuDNN and FlashAttention-2 are PyTorch's dense causal attention; {gpu_shape}, "
        f"random scores; median [min - max] of {gpu['shape']['repeats']} ({gpu_machine(gpu)}).",
        "\n".join(gpu_attention_lines()),
        "Milliseconds to build a block mask of 16 query and 4 KV heads, lifetimes given:",
        "\n".join(mask_lines()),
        "Ways to the gradient of the key biases, milliseconds at 32k, w = 1024, over segments; the `flex` backend "
        "takes the last, with FlexAttention computing dq alone:",
        "\n".join(bias_lines()),
        "Peak GPU memory of selection, plan, forward and backward at 16 query and 4 KV heads, w = 1024 (the same bytes "
        "in every run):",
        "\n".join(memory_lines()),
        "**`python benchmarks/gpu_mixers.py`**: milliseconds of a training step of a whole model on 32,768 random "
        "tokens in sequences of N, and its peak memory, with each attention; bf16-mixed, fused AdamW; layers of 80m "
        "compiled, those of 1.7b not compiled and computed again for the backward; median [min - max] of 5 and 3 "
        f"({gpu_machine(load('gpu_mixers'))}). Compiled steps of `dma` and `swa` at 80m wait "
        "for the processor, which CUDA graphs spare, below:",
        "\n".join(step_lines()),
        "**`python benchmarks/gpu_fit.py 80m`** and **`1.7b`**: the same through `dma-lightning fit` with "
        "`configs/trainer/gpu.yaml`, layers compiled, those of 80m as CUDA graphs, those of 1.7b computed again for "
        "the backward; thousand tokens per second and utilisation, as `SpeedMonitor` logs them, median [min - max] of "
        f"3 intervals (80m: {gpu_machine(load('gpu_fit_80m'))}; 1.7b: {gpu_machine(load('gpu_fit_1.7b'))}):",
        "\n".join(fit_lines()),
        "Milliseconds of such a step by what the GPU's kernels are for, from PyTorch's profiler, how long the GPU "
        "waits between them, and what the processor spends on data and in callbacks in a step that does not log "
        "(launches that wait for a busy GPU included); the last column says how much longer a step takes that logs, "
        "which is each 25th with that config, median of 3. A GPU waits longer in steps that are profiled than in those "
        "that are measured, by much at 1.7b, 4k, `dma`, whose parts are more than the step. Kernels of 80m are those "
        "of a short run without CUDA graphs, in which the GPU is cooler and they are faster than in the measured one: "
        f"{warm()}:",
        "\n".join(breakdown_lines()),
        "**`python benchmarks/gpu_scaling.py`**: thousand tokens per second of each GPU, and its peak memory, where "
        f"one and where {max(row['gpus'] for row in load('gpu_scaling')['runs'])} train; these runs at 4k with "
        "`dma`, as many tokens for each GPU, FSDP2 without CUDA graphs; median [min - max] of 3 intervals, and the "
        f"share of the speed of one ({gpu_machine(load('gpu_scaling'))}):",
        "\n".join(scaling_lines()),
        f"**`python benchmarks/gpu_monitoring.py`**: with all callbacks of `configs/trainer/gpu.yaml` but checkpoints, "
        f"validations and samples included, a step of 80m at 4k takes {overhead()} longer than with none of them, nor "
        f"a logger; two turns of 1,000 steps each ({gpu_machine(load('gpu_monitoring'))}).",
        "**`python benchmarks/gpu_block_attention.py`**: milliseconds of NSA's selected branch, given the blocks of "
        "each query (16 of 64 tokens, by random keys), bfloat16, batch 1, head dim 128, beside the Triton kernels of "
        "XunhaoLai (9bea856) and of flash-linear-attention (bc3b101d, which takes groups of 16 heads or more) and "
        "dense attention; ours makes its tiles in that time; median [min - max] of 3 "
        f"({gpu_machine(load('gpu_block_attention'))}).",
        "\n".join(block_lines()),
        f"**`make train`**: validation on the last tenth of the text ({machine(text)}; the corpora of the other Python "
        "versions were trained on with the same interpreter). A seed ends elsewhere on another processor, or when sums "
        "are taken in another order; how far, the seeds show.",
        "\n".join(text_lines()),
        f"**`make mqar`**: accuracy on 1,000 unseen examples; {solved} of {len(mqar['runs'])} seeds end at 98 % or "
        f"more, in {min(seconds):.0f} - {max(seconds):.0f} s each, some of them beside other work ({machine(mqar)}).",
        "\n".join(mqar_lines()),
        f"**`make bench`**: `sdpa` is PyTorch's dense causal attention; float32, batch 1, {shape['heads']} query and "
        f"{shape['kv_heads']} KV heads, head dim {shape['head_dim']}, w = {shape['window']}, selection included; "
        f"median [min - max] of separate processes ({machine(attention)}).",
        "\n".join(attention_lines()),
        "**`python benchmarks/gpu_decode.py`**: microseconds of a decoding step of one layer, replayed as a CUDA "
        "graph: the new key enters the cache and its query attends. 32 query and 8 KV heads, head dim 128, w = 1024, "
        "bfloat16. Beside it FlashAttention-2 over as many keys, without a cache to keep, and cuDNN's dense attention "
        "over a full cache (how many times slower); both are PyTorch's. Median [min - max] of 3 "
        f"({gpu_machine(load('gpu_decode'))}).",
        "\n".join(gpu_step_lines()),
        "Batch 1 by the length of what has been read: that step, and a token of a whole model "
        f"({load('gpu_decode')['model'][0]['parameters'] / 1e9:.2f}B parameters, random weights, "
        "`configs/model/1.7b.yaml`: 28 layers, w = 2048), with the memory of all its caches:",
        "\n".join(gpu_context_lines()),
        "![Time of a decoding step by context](../benchmarks/figures/decode.png)",
        "**`python benchmarks/cpu_decode.py`**: decoding with the tiny model, w = 64, batch 1, float32; the full cache "
        f"is for comparison, and selects anew at every token; median [min - max] ({machine(load('cpu_decode'))}).",
        "\n".join(decode_lines()),
        f"**`python benchmarks/decode_live_sets.py`**: of {sum(live['queries']):,} queries (layers, KV heads and "
        f"{live['length']:,} bytes of text; the model of `make train`, w = {live['window']}), {sum(live['different'])} "
        f"see other keys when decoded token by token than in one forward pass ({machine(live)}).",
    ]
    return "\n\n".join(parts)


def sections() -> dict[str, str]:
    """What each benchmark says of its results, by its name."""
    found: dict[str, list[str]] = {}
    for paragraphs in re.split(r"\n\n(?=\*\*`)", figures()):
        command = paragraphs.split("`")[1]
        name = MADE_BY.get(command) or re.findall(r"(\w+)\.py", command)[0]
        found.setdefault(name, []).append(paragraphs)
    return {name: "\n\n".join(parts) for name, parts in found.items()}


def section_of(name: str) -> str:
    """What a marker stands for."""
    if name in sections():
        return sections()[name]
    module = import_module(name)
    return "\n\n".join(module.tables(*map(load, module.RESULTS)))


def updated(page: Path) -> str:
    """A page with the figures of the result files."""
    return SECTION.sub(lambda found: found[1] + section_of(found[2]) + found[3], page.read_text())


def pages() -> list[Path]:
    """Where figures may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(updated(page))
