"""Tokens, their speed, utilization and memory, at logging steps."""

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import Throughput

from dma_lightning.data.base import Batch
from dma_lightning.model import decoder_of
from dma_lightning.monitoring.peaks import compute_dtype, peak_flops, wait_for
from dma_lightning.trainer_state import is_logging_step

_GIB = 2**30


class SpeedMonitor(pl.Callback):
    """Logs tokens seen, tokens/s and model FLOP/s of a device, utilization and peak memory.

    The progress bar also shows loss, tokens/s and utilization.

    Each figure covers the steps since the last logging step, without validation. Between logging steps nothing waits
    for the device (Lightning's `ThroughputMonitor` waits in every step).

    Args:
        peak_flops: FLOP/s that a device can do, the denominator of utilization. Default: the data sheet's figure for
            the precision of the trainer, without sparsity; measured on unknown devices, such as CPUs.

    Raises:
        ValueError: if the peak is not positive.
    """

    log_dict: Callable[..., None]  # the module's; Lightning gives it to callbacks

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops: expected FLOP/s above 0, such as 989e12, got {peak_flops}")
        self.peak_flops = peak_flops
        self.tokens_seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peak = self.peak_flops or peak_flops(pl_module.device, compute_dtype(trainer))[0]
        self.throughput = Throughput(available_flops=peak, world_size=trainer.world_size, window_size=2)
        self.batches = self.sequences = self.tokens = 0
        self.flops = 0.0  # since the last update
        self.flops_per_token: dict[int, float] = {}  # by sequence length
        self.paused: float | None = None
        wait_for(pl_module.device)
        self.started = time.perf_counter()
        self._update(self.started)

    def on_train_batch_start(self, *_: object) -> None:
        if self.paused is not None:
            self.started += time.perf_counter() - self.paused
            self.paused = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        (count, length), model = batch["input_ids"].shape, decoder_of(pl_module)
        if length not in self.flops_per_token:
            self.flops_per_token[length] = model.training_flops(length * model.parts)
        self.batches += 1
        self.sequences += count
        self.tokens += count * length
        self.flops += count * length * self.flops_per_token[length]
        self.tokens_seen += count * length * trainer.world_size
        if not is_logging_step(trainer):
            return
        wait_for(pl_module.device)
        self._update(time.perf_counter())
        found = self.throughput.compute()
        figures = {
            "speed/tokens_seen": float(self.tokens_seen),
            "speed/tokens_per_s": found["device/items_per_sec"],
            "speed/tflops_per_s": found["device/flops_per_sec"] / 1e12,
            "speed/mfu": found["device/mfu"],
        }
        if (memory := peak_memory(pl_module.device)) is not None:
            figures["memory/peak_gib"] = memory / _GIB
        self.log_dict(figures)
        # Tensors on the CPU, since Lightning converts what the progress bar shows to numbers in every step.
        shown = {"loss": trainer.callback_metrics.get("train/loss", torch.nan), "mfu": figures["speed/mfu"]}
        shown["tokens/s"] = figures["speed/tokens_per_s"]
        self.log_dict({name: torch.tensor(float(x)) for name, x in shown.items()}, prog_bar=True, logger=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            wait_for(pl_module.device)
            self.paused = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.tokens_seen = state_dict["tokens_seen"]

    def _update(self, now: float) -> None:
        counts = {"batches": self.batches, "samples": self.sequences, "lengths": self.tokens}
        self.throughput.update(
            time=now - self.started,
            flops=self.flops,  # type: ignore[arg-type]  # Lightning only adds them up
            **counts,
        )
        self.flops = 0.0


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes that PyTorch has held on a GPU, or that the process has had in memory; None on Windows CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # only on Unix

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
