"""Training through `dma-lightning fit` on one GPU: tokens/s, utilisation, and where the time of a step goes.

    python benchmarks/gpu_fit.py 80m      or 1.7b; a JSON file under benchmarks/results/

The model config of that name with configs/trainer/gpu.yaml and configs/data/prepared.yaml, on 32,768 random tokens a
step out of a vocabulary of 32,768, in sequences of one length without document borders. Layers are compiled; those of
80m run as CUDA graphs, and those of 1.7b are computed again for the backward. Validation and checkpoints are off, all
else is as configured. `mha` takes cuDNN's attention where it can.

Speed and utilisation are what `SpeedMonitor` logs at each logging step after the first: minimum, median and maximum.
Then PyTorch's profiler looks at a few steps of another run, without CUDA graphs, whose kernels it cannot tell apart:
milliseconds of the GPU's kernels by what they are for, and of the processor in Lightning's hooks for data and in
callbacks; what the measured step takes beyond the kernels is the GPU without work. For 80m, `overhead` compares the
speed with and without the callbacks of `dma_lightning.monitoring` (except the one that measures it), over logging
intervals of 100 steps.
"""

import argparse
import contextlib
import functools
import gc
import io
import multiprocessing
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from environment import describe, write_tables
from gpu_mixers import SDPA
from lightning.pytorch.profilers import Profiler
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

from dma_lightning.callbacks import FitReport
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.cli import build_cli
from dma_lightning.data.shards import MANIFEST, VERSION, ShardWriter, write_json
from dma_lightning.mixers import MIXERS
from dma_lightning.model import ModelConfig
from dma_lightning.monitoring import SpeedMonitor
from dma_lightning.sizes_command import read_config

CONFIGS = Path(__file__).parents[1] / "configs"
TOKENS, LENGTHS, VOCABULARY = 32768, [4096, 16384, 32768], 32768
CORPUS = 16 << 20  # tokens
RECOMPUTED = "1.7b"
INTERVAL, FIGURES = {"80m": 10, RECOMPUTED: 2}, {"80m": 5, RECOMPUTED: 3}  # steps per figure; figures after the first
PROFILED, KERNELS = 3, 40  # steps; kernels that are listed by name

# What an operation, or Lightning's action around it, is for; products with weights are told by their sizes.
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
    """Names what Lightning does for PyTorch's profiler."""

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


class Measurement(pl.Callback):
    """Collects the logged figures, then profiles a few steps, none of which logs.

    Args:
        profiled: how many.
    """

    def __init__(self, profiled: int) -> None:
        self.profiled, self.figures = profiled, []
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        self.profile = profile(activities=activities, record_shapes=True) if profiled else None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if self.profile and trainer.global_step == trainer.max_steps - self.profiled - 1:
            torch.cuda.synchronize()
            self.profile.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            names = ("tokens_per_s", "mfu")
            self.figures.append({name: float(trainer.callback_metrics[f"speed/{name}"]) for name in names})
        if self.profile and trainer.global_step == trainer.max_steps - 1:
            torch.cuda.synchronize()
            self.profile.stop()


def write_corpus(folder: Path) -> None:
    """Random tokens, as `dma-lightning prepare` writes them."""
    writer = ShardWriter(folder, 0, np.dtype("uint16"))
    writer.add(np.random.default_rng(0).integers(VOCABULARY, size=CORPUS), 4 * CORPUS)
    writer.end_document()
    record = writer.finish(1, 0)
    shard = {"name": record.name, "tokens": record.tokens}
    counts = {"tokens": CORPUS, "bytes": 4 * CORPUS, "vocab_size": VOCABULARY, "tokenizer_sha256": None}
    write_json(folder / MANIFEST, {"version": VERSION, "dtype": "uint16", "shards": [shard], **counts})


def fit(
    corpus: Path,
    shape: str,
    length: int,
    attention: str,
    steps: int,
    log_every: int,
    profiled: int = 0,
    monitors: bool = True,
    layers: int | None = None,
) -> Measurement:
    """Train a new model for so many steps, with the callbacks of `dma_lightning.monitoring` or without.

    If steps are profiled, CUDA graphs are not used.
    """
    configs = [f"--config={CONFIGS / name}.yaml" for name in (f"model/{shape}", "data/prepared", "trainer/gpu")]
    data = {"path": corpus, "sequence_length": length, "batch_size": TOKENS // length, "separate_documents": False}
    model = {"attention": attention, "compile_layers": True}
    model |= {"cuda_graphs": shape != RECOMPUTED and not profiled, "activation_checkpointing": shape == RECOMPUTED}
    if layers is not None:
        model["num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory() as runs:
        trainer = {"devices": 1, "max_steps": steps, "log_every_n_steps": log_every, "limit_val_batches": 0}
        trainer["logger.init_args.save_dir"] = runs
        options = {"data": data, "model": model, "trainer": trainer}
        flags = [
            f"--{part}.{name}={str(x).lower() if isinstance(x, bool) else x}"
            for part, values in options.items()
            for name, x in values.items()
        ]
        with torch.device("cuda"):  # the 1.7 billion weights of the larger are drawn in no time
            cli = build_cli([*configs, *flags], run=False)
        measurement = Measurement(profiled)
        cli.trainer.profiler = Actions()
        kept = [x for x in cli.trainer.callbacks if not isinstance(x, ResumableCheckpoint | FitReport)]
        cli.trainer.callbacks = [x for x in kept if monitors or not _can_be_left(x)] + [measurement]
        with sdpa_kernel(SDPA, set_priority=True), contextlib.redirect_stdout(io.StringIO()):
            cli.trainer.fit(cli.model, cli.datamodule)
    return measurement


def _can_be_left(callback: pl.Callback) -> bool:
    return "dma_lightning.monitoring" in type(callback).__module__ and not isinstance(callback, SpeedMonitor)


def compile_ahead(corpus: Path, case: tuple[str, int, str]) -> str | None:
    """Compile what `fit` does, with one layer, since the layers of a model share it; an error as text."""
    try:
        for profiled in (0, 1):
            fit(corpus, *case, steps=3, log_every=3, profiled=profiled, layers=1)
    except Exception as error:
        return str(error)[-300:]
    return None


def measure(corpus: Path, cases: list[tuple[str, int, str]]) -> Iterator[dict[str, Any]]:
    """One row by shape, length and attention."""
    for shape, length, attention in cases:
        every = INTERVAL[shape]
        found = fit(corpus, shape, length, attention, every * (1 + FIGURES[shape]), every)
        row = {"shape": shape, "length": length, "attention": attention, **spreads(found.figures)}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        forget()
        steps = 2 * PROFILED + 1
        row |= breakdown(fit(corpus, shape, length, attention, steps, steps, PROFILED).profile, row)
        yield row
        forget()


def overhead(corpus: Path) -> Iterator[dict[str, Any]]:
    """Speed of the smaller model with and without the monitors."""
    for monitors in (True, False, False, True):
        found = fit(corpus, "80m", LENGTHS[0], "dma", steps=301, log_every=100, monitors=monitors)
        yield {"monitors": monitors, **spreads(found.figures)}
        forget()


def forget() -> None:
    """Leave nothing of a model on the GPU."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def spreads(figures: list[dict[str, float]]) -> dict[str, list[float]]:
    """Minimum, median and maximum of each figure after the first."""
    columns = {name: [row[name] for row in figures[1:]] for name in figures[0]}
    return {name: [min(column), statistics.median(column), max(column)] for name, column in columns.items()}


def breakdown(profiled: profile, row: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a step: of the GPU by purpose and idle, and of the processor in some of Lightning's actions."""
    config = read_config(CONFIGS / "model" / f"{row['shape']}.yaml")
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
    step = 1e3 * TOKENS / row["tokens_per_s"][1]

    def milliseconds(times: Counter[str]) -> dict[str, float]:
        return {name: time / 1e3 / PROFILED for name, time in times.most_common()}

    found = milliseconds(gpu)
    kernels = dict(list(milliseconds(largest).items())[:KERNELS])
    idle = step - sum(found.values())
    return {
        "step_ms": step,
        "gpu_ms": found | {"idle": idle},
        "processor_ms": milliseconds(processor),
        "kernels": kernels,
    }


def kernels_of(profiled: profile) -> Iterator[tuple[FunctionEvent, str, float]]:
    """The operation that started each kernel, the kernel, and the microseconds for which it ran alone.

    Some are reported to begin while the one before still runs.
    """
    operations = {x.id: x for x in profiled.events() if x.device_type == DeviceType.CPU and x.id}
    events = profiled.profiler.kineto_results.events()
    kernels = [x for x in events if x.device_type() == DeviceType.CUDA and x.linked_correlation_id() in operations]
    ended = 0
    for kernel in sorted(kernels, key=lambda x: x.start_ns()):
        end = kernel.start_ns() + kernel.duration_ns()
        alone = max(0, end - max(ended, kernel.start_ns()))
        yield operations[kernel.linked_correlation_id()], kernel.name(), alone / 1e3
        ended = max(ended, end)


def purpose_of(event: FunctionEvent, kernel: str, config: ModelConfig) -> str:
    """What a kernel is for, by the operations that it was launched in."""
    parent: FunctionEvent | None = event
    found = None
    while parent is not None and found is None:  # Lightning computes the step within that of the optimizer
        found = next((part for part in PURPOSES if part in parent.name), None)
        parent = parent.cpu_parent
    if found is not None and PURPOSES[found] is not None:
        return PURPOSES[found]
    shapes = [shape for shape in event.input_shapes or [] if len(shape) == 2]
    if event.name in ("aten::mm", "aten::addmm") and len(shapes) >= 2:
        sizes = Counter([*shapes[-2], shapes[-1][1]])
        sizes[TOKENS] -= 1
        sizes = +sizes
        by_size = {
            VOCABULARY: "logits and loss",
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


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(INTERVAL))
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--attentions", nargs="*", default=["dma", "mha"], choices=list(MIXERS))
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/gpu_fit_SHAPE.json")
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / "results" / f"gpu_fit_{args.shape}.json"
    sys.argv = sys.argv[:1]  # LightningCLI warns of arguments that are not its own
    cases = list(product([args.shape], args.lengths, args.attentions))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        write_corpus(corpus)
        with ProcessPoolExecutor(len(cases), mp_context=multiprocessing.get_context("spawn")) as pool:
            ahead = pool.map(functools.partial(compile_ahead, corpus), cases)  # into Inductor's cache
            for case, error in zip(cases, ahead, strict=True):
                if error:
                    print(f"{case}: {error}", flush=True)
        tables = {"steps": measure(corpus, cases)}
        if args.shape != RECOMPUTED:
            tables["overhead"] = overhead(corpus)
        write_tables(out, {"environment": describe()}, tables)


if __name__ == "__main__":
    main()
