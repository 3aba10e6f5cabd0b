"""Training through `dma-lightning fit` on one GPU: tokens/s, utilization, and what a step spends its time on.

    python benchmarks/gpu_fit.py 80m      or 1.7b

The model config is the published form of that name, with configs/trainer/gpu.yaml and configs/data/prepared.yaml. Each
step takes 32,768 random tokens from a vocabulary of 32,768, in sequences of one length without document borders. Layers
are compiled; those of 80m run as CUDA graphs, and those of 1.7b are recomputed in the backward pass. Validation and
checkpoints are off; everything else is as configured. `mha` uses cuDNN's attention where it can.

Speed and utilization are what `SpeedMonitor` logs at each logging step after the second: minimum, median and maximum.
The cost of logging is how much longer a logging step and the step after it take on the GPU than two other steps.

After these steps, PyTorch's profiler measures a few more: how long the GPU computes, and how long it waits between
kernels. It also adds up the time of kernels by their purpose, and the processor's time in Lightning's data hooks and in
callbacks. For 1.7b, these come from the same profiled steps. For 80m, they come from a short run without CUDA graphs,
since the profiler cannot tell what the kernels of a graph are for. That run ends before the GPU is warm, so its kernels
are faster.
"""

import gc
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product, starmap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from dma_lightning.cli.sizes import read_config
from dma_lightning.config import ModelConfig
from dma_lightning.mixers import MIXERS
from harness import CONFIGS, CommandLine, Part, Result, Row, Table, describe, record, spread, training
from harness.tables import gpu_of, interval, length_of
from harness.training import Case, LoggedFigures, compile_ahead, fit, write_corpus

PROFILED, KERNELS = 3, 40  # profiled steps; kernels that are listed by name
STATE = {
    "clocks.sm": "clock_mhz",
    "clocks.max.sm": "largest_clock_mhz",
    "power.draw": "watts",
    "power.limit": "most_watts",
}

# What an operation, or Lightning's action around it, is for. Products with weights are identified by their sizes.
PURPOSES = {
    "attend_slots": "attention",
    "scaled_dot_product": "attention",
    "top_w_deaths": "selection",
    "segment_slots": "selection",
    "batch_to_device": "data",
    "on_before_optimizer_step": "optimizer",
    "configure_gradient_clipping": "optimizer",
    "training_step": None,
    "backward": None,
    "Optimizer.step": "optimizer",
}


class Actions(Profiler):
    """Marks Lightning's actions by name in the trace of PyTorch's profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[str, record_function] = {}

    def start(self, action_name: str) -> None:
        if torch.autograd._profiler_enabled():
            self.open[action_name] = record_function(f"lightning: {action_name}")
            self.open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if action_name in self.open:
            self.open.pop(action_name).__exit__(None, None, None)


class Measurement(LoggedFigures):
    """Collects the logged figures, then profiles a few steps before the last one, none of which logs."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[torch.cuda.Event] = []  # when each step begins on the GPU
        self.state: dict[str, float] = {}
        self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.begun.append(torch.cuda.Event(enable_timing=True))
        self.begun[-1].record()
        if trainer.global_step == trainer.max_steps - PROFILED - 1:
            self.state = gpu_state()  # while the GPU still computes earlier steps
            torch.cuda.synchronize()
            self.profile.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        super().on_train_batch_end(trainer)
        if trainer.global_step == trainer.max_steps - 1:
            torch.cuda.synchronize()
            self.profile.stop()


def logging_ms(begun: list[torch.cuda.Event], log_every: int) -> list[float]:
    """Milliseconds that logging costs in each interval, which begins with the step after a logging step.

    That step counts too, since the GPU waits in it.
    """
    torch.cuda.synchronize()
    steps = [a.elapsed_time(b) for a, b in pairwise(begun)]
    intervals = [
        steps[i : i + log_every] for i in range(0, log_every * (training.COMPILING + training.FIGURES), log_every)
    ]
    return [first + last - 2 * statistics.median(others) for first, *others, last in intervals[training.COMPILING :]]


def gpu_state() -> dict[str, float]:
    """The GPU's clock and power, and the maximum of each."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return dict(zip(STATE.values(), map(float, found.split(",")), strict=True))


def compile_case(corpus: Path, case: Case) -> None:
    """Compile what a measurement needs. One layer is enough, since all layers share the compiled code."""
    for graphs in {False, case.shape != training.RECOMPUTED}:
        fit(corpus, case, pl.Callback(), {"max_steps": 4, "log_every_n_steps": 3}, graphs=graphs, num_hidden_layers=1)


def profiled_fit(corpus: Path, case: Case, steps: int, log_every: int, graphs: bool) -> Measurement:
    """Train for `steps` steps, and a few more that are profiled."""
    found, options = Measurement(), {"max_steps": steps + PROFILED + 1, "log_every_n_steps": log_every}
    fit(corpus, case, found, options, graphs=graphs, profiler=Actions())
    return found


def measure(corpus: Path, cases: list[Case]) -> Iterator[Row]:
    """One row for each case."""
    for case in cases:
        every, graphs = training.INTERVAL[case.shape], case.shape != training.RECOMPUTED
        found = profiled_fit(corpus, case, every * (training.COMPILING + training.FIGURES), every, graphs)
        row = {**case._asdict(), **found.spreads()}
        row["logging_ms"] = spread(logging_ms(found.begun, every))
        row |= {
            "step_ms": 1e3 * training.TOKENS / row["tokens_per_s"][1],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        row |= found.state | busy_and_waiting(found.profile)
        if graphs:
            forget()
            found = profiled_fit(corpus, case, steps=3, log_every=100, graphs=False)
        yield row | breakdown(found.profile, case.shape)
        forget()


def forget() -> None:
    """Remove a model and its compiled code from the GPU."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def busy_and_waiting(profiled: profile) -> dict[str, float]:
    """Per step: milliseconds in which the GPU computes, and in which it waits between kernels; number of kernels."""
    kernels = [(alone, waited) for _, alone, waited in timeline(profiled)]
    busy, waiting = (sum(times) / 1e6 / PROFILED for times in zip(*kernels, strict=True))
    return {"busy_ms": busy, "waiting_ms": waiting, "launched": len(kernels) / PROFILED}


def breakdown(profiled: profile, shape: str) -> dict[str, Any]:
    """Milliseconds per step: the GPU's by purpose, and the processor's in some of Lightning's actions."""
    config = read_config(CONFIGS / "model" / f"{shape}-published.yaml")
    gpu: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    processor: Counter[str] = Counter()
    for event in profiled.events():
        if event.device_type == DeviceType.CPU and event.name.startswith("lightning: "):
            if "train_dataloader_next" in event.name or "batch_to_device" in event.name:
                processor["data"] += event.cpu_time_total
            elif "[Callback]" in event.name:
                processor["callbacks"] += event.cpu_time_total
    for operation, kernel, microseconds in kernels_of(profiled):
        purpose = purpose_of(operation, kernel, config)
        gpu[purpose] += microseconds
        largest[f"{purpose}: {kernel[:80]}"] += microseconds

    def milliseconds(times: Counter[str]) -> dict[str, float]:
        return {name: time / 1e3 / PROFILED for name, time in times.most_common()}

    kernels = dict(list(milliseconds(largest).items())[:KERNELS])
    return {"gpu_ms": milliseconds(gpu), "processor_ms": milliseconds(processor), "kernels": kernels}


def kernels_of(profiled: profile) -> Iterator[tuple[FunctionEvent, str, float]]:
    """The operation that started each kernel, the kernel, and the microseconds for which it ran alone."""
    operations = {x.id: x for x in profiled.events() if x.device_type == DeviceType.CPU and x.id}
    for kernel, alone, _ in timeline(profiled):
        if kernel.linked_correlation_id() in operations:
            yield operations[kernel.linked_correlation_id()], kernel.name(), alone / 1e3


def timeline(profiled: profile) -> Iterator[tuple[Any, int, int]]:
    """Kernels in order, with the nanoseconds for which each ran alone and those for which the GPU waited before it.

    Some kernels are reported to begin while the previous one still runs.
    """
    events = profiled.profiler.kineto_results.events()
    kernels = [x for x in events if x.device_type() == DeviceType.CUDA and not x.is_user_annotation()]
    ended = min(x.start_ns() for x in kernels)
    for kernel in sorted(kernels, key=lambda x: x.start_ns()):
        start, end = kernel.start_ns(), kernel.start_ns() + kernel.duration_ns()
        yield kernel, max(0, end - max(ended, start)), max(0, start - ended)
        ended = max(ended, end)


def purpose_of(event: FunctionEvent, kernel: str, config: ModelConfig) -> str:
    """What a kernel is for, judged by the operations that launched it."""
    parent: FunctionEvent | None = event
    found = None
    while parent is not None and found is None:  # Lightning computes the step inside the optimizer's step
        found = next((part for part in PURPOSES if part in parent.name), None)
        parent = parent.cpu_parent
    if found is not None and PURPOSES[found] is not None:
        return PURPOSES[found]
    shapes = [shape for shape in event.input_shapes or [] if len(shape) == 2]
    if event.name in ("aten::mm", "aten::addmm") and len(shapes) >= 2:
        sizes = Counter([*shapes[-2], shapes[-1][1]])
        sizes[training.TOKENS] -= 1
        sizes = +sizes
        by_size = {
            training.VOCABULARY: "logits and loss",
            config.intermediate_size: "MLP",
            config.num_key_value_heads: "selection",
        }
        return next((purpose for size, purpose in by_size.items() if size in sizes), "projections")
    by_name = {
        "cudnn": "attention",
        "silu": "MLP",
        "softmax": "logits and loss",
        "nll_loss": "logits and loss",
        "triton_": "norms and rotary",
    }
    return next((purpose for part, purpose in by_name.items() if part in kernel), "other")


RESULTS = ("gpu_fit_80m", "gpu_fit_1.7b")
GPU_PARTS = ("attention", "selection", "projections", "MLP", "norms and rotary", "logits and loss", "optimizer")
GPU_PARTS += ("other",)
BESIDE = ("data", "callbacks")


def tables(small: Result, large: Result) -> list[Part]:
    """What the pages show: speed by attention, and what a step spends its time on."""
    rows = [*small["steps"], *large["steps"]]
    return [
        Table(
            zip(*([row for row in rows if row["attention"] == name] for name in ("dma", "mha")), strict=True),
            "**`python benchmarks/gpu_fit.py 80m`** and **`1.7b`**: thousands of tokens per second and utilization of "
            "`dma-lightning fit` on a GPU, on the same tokens as above; higher is better. The trainer is "
            "`configs/trainer/gpu.yaml`. Layers are compiled; those of 80m run as CUDA graphs, and those of 1.7b are "
            "recomputed in the backward pass. `SpeedMonitor` logs the figures; median [min - max] of 3 intervals "
            f"(80m: {gpu_of(small)}; 1.7b: {gpu_of(large)}):",
            ["model, N", "`dma`", "`mha`", "speed of `dma` / `mha`"],
            speed_cells,
        ),
        Table(
            rows,
            "Milliseconds of the parts of such a step; lower is better. PyTorch's profiler measured the GPU's kernels "
            "and the GPU's waiting time between them. The two columns for the processor (CPU) show its time for data "
            "and callbacks in a step that does not log, including launches that wait for a busy GPU. The last column "
            "shows how much longer a step takes if it logs (median of 3). With this config, every 25th step logs. The "
            "GPU waits longer in profiled steps than in measured ones, so for 1.7b, 4k, `dma`, the parts add up to "
            "more than the step. Kernels of 80m come from a short run without CUDA graphs. There, the GPU is cooler "
            "and the kernels are faster. "
            f"{in_words(next(row for row in rows if row['attention'] == 'dma'))}:",
            ["", "step", *GPU_PARTS, "waiting", *(f"processor: {x}" for x in BESIDE), "logging, once in 25 steps"],
            time_cells,
        ),
    ]


def speed_cells(pair: tuple[Row, Row]) -> list[str]:
    """Thousands of tokens per second and utilization of two attentions, and how much faster the first is."""
    speeds = [f"{interval(row['tokens_per_s'], 1e3)}, {row['mfu'][1]:.1%}" for row in pair]
    first, second = (row["tokens_per_s"][1] for row in pair)
    return [f"{pair[0]['shape']}, {length_of(pair[0])}", *speeds, f"{first / second:.2f}x"]


def time_cells(row: Row) -> list[str]:
    """Milliseconds of a step and its parts."""
    gpu = Counter(row["gpu_ms"])
    gpu["other"] += gpu["data"]
    times = [row["step_ms"], *(gpu[part] for part in GPU_PARTS), row["waiting_ms"]]
    times += [*(row["processor_ms"][part] for part in BESIDE), row["logging_ms"][1]]
    return [f"{row['shape']}, {length_of(row)}, `{row['attention']}`", *(f"{time:.1f}" for time in times)]


def in_words(row: Row) -> str:
    """What the GPU does in the measured run."""
    return (
        f"In the measured run, `dma` at 4k computes for {row['busy_ms']:.1f} ms of a step and waits for "
        f"{row['waiting_ms']:.1f}, at {row['watts']:.0f} of {row['most_watts']:.0f} W "
        f"and {row['clock_mhz']:.0f} of {row['largest_clock_mhz']:.0f} MHz"
    )


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "gpu_fit_{shape}", gpus=1, duration="less than ten minutes on an H200")
    line.add_argument("shape", choices=list(training.INTERVAL))
    line.add_lengths(training.LENGTHS)
    names = ["dma", "mha"]
    line.add_argument("--attentions", nargs="+", default=names, choices=list(MIXERS), help="default: dma mha")
    args = line.parse_args()
    cases = list(starmap(Case, product([args.shape], args.lengths, args.attentions)))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        write_corpus(corpus)
        compile_ahead(partial(compile_case, corpus), cases)
        record(args.out, {"environment": describe()}, {"steps": measure(corpus, cases)})


if __name__ == "__main__":
    main()
