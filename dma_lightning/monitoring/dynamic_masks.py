"""What dynamic mask attention selects, layer by layer."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dma_lightning.data.base import Batch
from dma_lightning.model import decoder_of
from dma_lightning.monitoring.recording import dynamic_layers, first_sequence, record_masks
from dma_lightning.monitoring.writer import ShowingMonitor, Writer, writers
from dma_lightning.trainer_state import is_logging_step, logged_step


class DynamicMaskMonitor(ShowingMonitor):
    """Logs live fraction, births, own keys, lifetimes, and histograms of A and of scores for each layer.

    They come from one extra forward pass over the first sequence of the batch. Other attentions log nothing.

    Args:
        every_n_steps: how often to log; it logs at the first logging step at least this many steps after the last
            time, and at the very first logging step.

    Raises:
        ValueError: if it is below 1.
    """

    shows = "histograms"

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected at least 1, got {every_n_steps}")
        self.every_n_steps, self.next_step = every_n_steps, 0

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next_step = state_dict["next_step"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        due = trainer.global_step >= self.next_step and is_logging_step(trainer)
        if not due or not (mixers := dynamic_layers(decoder_of(pl_module))):
            return
        self.next_step = trainer.global_step + self.every_n_steps
        recorded = record_masks(trainer, decoder_of(pl_module), first_sequence(batch))
        figures = {f"dma/layer_{i}/{name}": x for i, mask in recorded.items() for name, x in mask.figures().items()}
        values = torch.stack(list(figures.values())).tolist()  # waits for the GPU once instead of for each figure
        known = {name: x for name, x in zip(figures, values, strict=True) if not math.isnan(x)}
        for logger in trainer.loggers:  # directly, since Lightning would repeat the figures at every logging step
            logger.log_metrics(known, logged_step(trainer))
        shown_by = writers(trainer)
        for i, mixer in mixers.items():
            scores = recorded[i].scores
            _add_histogram(shown_by, f"dma/layer_{i}/A", mixer.A, logged_step(trainer))
            real = recorded[i].real.expand_as(scores)
            _add_histogram(shown_by, f"dma/layer_{i}/scores", scores[real], logged_step(trainer))


def _add_histogram(shown_by: Sequence[Writer], tag: str, values: Tensor, step: int) -> None:
    """Add a histogram of the finite values, if there are any."""
    if isinstance(values, DTensor):
        values = values.full_tensor()  # gathers a sharded parameter: a collective call
    values = values.detach().float()
    values = values[values.isfinite()]
    for writer in shown_by if len(values) else ():
        writer.add_histogram(tag, values, step)
