"""The cost of the monitoring callbacks on a CPU.

The model and data are those of `make train`, with dynamic masks as published, in one thread and without validation. The
callbacks of `dma_lightning.monitoring` are switched on and off in turns of 10 steps (on, off, off, on, ...), each of
which ends with a logging step. The cost is measured in processor time, since wall-clock time depends on what else the
machine does. It is given twice: as the difference between turns with and without callbacks, and as the time spent
inside the callbacks, which varies less. Masks are examined once in 100 steps, counting both kinds of turns, so twice as
often as in a normal run. Samples are written after every second validation. Their cost is compared with that of the
steps between them.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch

from dma_lightning.cli.entry import DMACLI, build_cli
from dma_lightning.monitoring import SampleMonitor
from harness import CONFIGS, CommandLine, Result, Row, describe, record

TURN, WARM_UP = 10, 10  # steps
STEPS_BETWEEN_SAMPLES = 400  # every second validation of configs/trainer/cpu.yaml


class Turns(pl.Callback):
    """Switches other callbacks on and off, and records the milliseconds per step of each turn.

    Args:
        callbacks: the callbacks to switch.
    """

    def __init__(self, callbacks: list[pl.Callback]) -> None:
        self.rows: list[Row] = []
        self.on, self.inside = True, 0.0
        for callback in callbacks:
            for hook in ("on_train_batch_start", "on_train_batch_end"):
                setattr(callback, hook, self._switched(getattr(callback, hook)))

    def _switched(self, hook: Callable[..., None]) -> Callable[..., None]:
        def switched(*args: Any) -> None:
            if self.on:
                start = time.process_time()
                hook(*args)
                self.inside += time.process_time() - start

        return switched

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        turn, place = divmod(trainer.global_step - WARM_UP, TURN)
        if turn < 0 or place:
            return
        now = time.process_time(), time.perf_counter()
        if turn:
            cpu, clock = (1e3 * (end - start) / TURN for start, end in zip(self.start, now, strict=True))
            row = {"on": self.on, "processor_ms": cpu, "inside_ms": 1e3 * self.inside / TURN, "clock_ms": clock}
            self.rows.append(row)
        self.on, self.inside, self.start = turn % 4 in (0, 3), 0.0, now


class TimedSamples(SampleMonitor):
    """Records how long samples take."""

    def on_validation_end(self, *args: Any) -> None:
        start = time.process_time()
        super().on_validation_end(*args)
        self.seconds = time.process_time() - start


def build(folder: str, *args: str) -> DMACLI:
    """The run of `make train`, but with masks as published, and with its logs in a folder."""
    layers = [f"--config={CONFIGS / name}.yaml" for name in ("model/tiny-published", "data/pydoc", "trainer/cpu")]
    quiet = ["--trainer.enable_model_summary=false", f"--trainer.logger.init_args.save_dir={folder}"]
    return build_cli([*layers, *quiet, "--trainer.num_sanity_val_steps=0", *args], run=False)


def turns(count: int) -> Iterator[Row]:
    """One row for each turn: milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        steps = f"--trainer.max_steps={WARM_UP + TURN * count + 1}"
        cli = build(folder, steps, "--trainer.limit_val_batches=0")
        callbacks = cli.trainer.callbacks
        switch = Turns([x for x in callbacks if "dma_lightning.monitoring" in type(x).__module__])
        cli.trainer.callbacks = [switch, *callbacks]
        cli.trainer.fit(cli.model, cli.datamodule)
    yield from switch.rows


def samples(count: int) -> Iterator[Row]:
    """Milliseconds of processor time for the pictures, texts and sample after one validation."""
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            cli = build(folder, *(f"--trainer.{name}" for name in ("max_steps=2", "val_check_interval=2")))
            timed = TimedSamples()
            cli.trainer.callbacks, cli.trainer.limit_val_batches = [timed], 1
            cli.trainer.fit(cli.model, cli.datamodule)
        yield {"ms": 1e3 * timed.seconds}


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "monitoring_overhead", duration="about five minutes on one core")
    line.add_argument("--turns", type=int, default=40, help="a multiple of 4 (default: 40)")
    args = line.parse_args()
    torch.set_num_threads(1)
    result: Result = {"environment": describe()}
    record(args.out, result, {"samples": samples(5), "turns": turns(args.turns)})
    on, off = ([row for row in result["turns"] if row["on"] is which] for which in (True, False))
    for kind in (mean, median):
        with_, without = (kind(row["processor_ms"] for row in rows) for rows in (on, off))
        print(f"{kind.__name__} of turns: {with_:.1f} ms with, {without:.1f} without, {with_ / without - 1:+.2%}")
    step = mean(row["processor_ms"] for row in off)
    print(f"inside the callbacks: {mean(row['inside_ms'] for row in on) / step:.2%} of a step")
    sample = median(row["ms"] for row in result["samples"])
    print(f"samples: {sample:.0f} ms, {sample / step / STEPS_BETWEEN_SAMPLES:.2%} of the steps between them")


if __name__ == "__main__":
    main()
