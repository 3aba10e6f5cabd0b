"""A table of what a run is going to do, printed before its first step."""

import time
from typing import Any

import lightning.pytorch as pl

from dma_lightning.data.base import Batch
from dma_lightning.model import decoder_of
from dma_lightning.monitoring.peaks import compute_dtype, peak_flops, wait_for
from dma_lightning.schedules import total_steps
from dma_lightning.trainer_state import accumulates, is_logging_step


class RunSummary(pl.Callback):
    """Prints sizes, attention, backend, batch and tokens of a run, and after a few steps how long it will take."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.printed = self.estimated = False
        self.started: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.printed:
            return
        self.printed = True
        rows = summary_rows(trainer, pl_module, *batch["input_ids"].shape)
        width = max(len(name) for name in rows)
        trainer.print("\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows.items()), ""]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.estimated or accumulates(trainer):
            return
        if self.started is None:  # after the first step, which may compile layers
            wait_for(pl_module.device)
            self.started, self.first_step = time.perf_counter(), trainer.global_step
            return
        if not is_logging_step(trainer):
            return
        self.estimated = True
        wait_for(pl_module.device)
        per_step = (time.perf_counter() - self.started) / (trainer.global_step - self.first_step)
        total = total_steps(trainer)
        left = 0 if total is None else total - trainer.global_step
        if left:
            steps = f"{left:,} steps x {1e3 * per_step:,.0f} ms, without validation"
            trainer.print(f"estimated time: {duration(per_step * left)} ({steps})")


def summary_rows(trainer: pl.Trainer, pl_module: pl.LightningModule, sequences: int, length: int) -> dict[str, str]:
    """The table for batches `[sequences, length]` of each device: titles of its rows, and their values."""
    model = decoder_of(pl_module)
    mixer, device, dtype = model.mixers[0], pl_module.device, compute_dtype(trainer)
    accumulated, devices, steps = trainer.accumulate_grad_batches, trainer.world_size, total_steps(trainer)
    length, groups = length * model.parts, devices // model.parts  # a batch may have parts of sequences
    per_step = sequences * accumulated * groups * length
    sharing = (
        f"{devices} devices" if model.parts == 1 else f"{groups} group{'s' * (groups > 1)} of {model.parts} devices"
    )
    flops = model.training_flops(length)
    rows = {
        "parameters": f"{model.num_parameters:,}, {model.num_non_embedding_parameters:,} without embeddings and head",
        "attention": f"{model.config.attention} ({type(mixer).__name__})",
        "computed by": mixer.computed_by(device, dtype),
        "devices": f"{devices} x {device.type}, precision {trainer.precision}",
        "step": f"{sequences} sequences x {accumulated} accumulated x {sharing} "
        f"= {sequences * accumulated * groups} of {length:,} tokens, {per_step:,} tokens",
        "FLOPs": f"{flops:.3g} per token, forward and backward; {flops * per_step:.3g} per step",
    }
    if (mixture := getattr(getattr(trainer, "datamodule", None), "train_mixture", None)) is not None:
        rows["data"] = mixture.description
    if steps is None:
        return rows | {"run": "no end is set"}
    left = steps - trainer.global_step
    done = f" ({trainer.global_step:,} of {steps:,} are done)" if trainer.global_step else ""
    shortest = flops * left * per_step / devices / peak_flops(device, dtype)[0]
    return rows | {
        "run": f"{left:,} steps{done}, {left * per_step:,} tokens, {flops * left * per_step:.3g} FLOPs",
        "time": f"at least {duration(shortest)}, at a utilization of 100%; measured and estimated after a few steps",
    }


def duration(seconds: float) -> str:
    """A time in its two largest units: `2 d 3 h`, `1 h 5 min`, `3 min 20 s`, `45 s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = [(days, "d"), (h, "h"), (m, "min"), (s, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])
