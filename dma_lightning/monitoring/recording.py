"""What layers do over sequences, seen in one extra forward pass, and figures of dynamic masks.

C hidden size, G KV heads, N length.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from dma_kernels import Lifetimes, Packing
from dma_lightning.data.base import Batch
from dma_lightning.generation import evaluating
from dma_lightning.mixers import DynamicMaskAttention, TokenMixer
from dma_lightning.model import DogeForCausalLM, decoder_of

Mixer = TypeVar("Mixer", bound=TokenMixer)
Seen = TypeVar("Seen")


@dataclass(frozen=True)
class RecordedMask:
    """One layer's mask over one sequence."""

    lifetimes: Lifetimes
    """Lifetime of every key, `[1, G, N]`."""
    causal: Lifetimes
    """The keys that a query could see: those of its past in its document, `[1, 1, N]`."""
    scores: Tensor
    """Score of every key, `[1, G, N]`."""
    capacity: int
    """Maximum number of keys that a query keeps."""

    @property
    def real(self) -> Tensor:
        """Positions that are not padding, bool `[1, 1, N]`."""
        return self.causal.death > self.causal.birth

    @property
    def born(self) -> Tensor:
        """Keys that their own query sees, bool `[1, G, N]`; no query ever sees the others."""
        return self.lifetimes.death > self.lifetimes.birth

    def figures(self) -> dict[str, Tensor]:
        """Means over heads and positions, each a scalar; NaN if there is nothing to average.

        `live_fraction`: keys that queries see, as a share of those that they could see.
        `births`: share of keys that enter, among positions where a key must leave for a new one.
        `own_key`: share of all queries that see the key of their own position.
        `mean_lifetime`: how many queries see a key that enters, up to the end of the sequence.
        """
        lives, could = self.lifetimes.live_counts(), self.causal.live_counts()
        full = (could > self.capacity) & self.real
        span = (self.lifetimes.death - self.lifetimes.birth).float()
        return {
            "live_fraction": lives.sum() / could.expand_as(lives).sum(),
            "births": _mean_where(self.born.float(), full),
            "own_key": _mean_where(self.born.float(), self.real),
            "mean_lifetime": _mean_where(span, self.born),
        }

    def kept_shares(self) -> Tensor:
        """Share of the later queries in its document that see each key, mean over heads, `[N]`."""
        lived = (self.lifetimes.death - self.lifetimes.birth).clamp(min=0)
        possible = (self.causal.death - self.causal.birth).clamp(min=1)
        return (lived / possible).mean(1)[0]


def _mean_where(x: Tensor, where: Tensor) -> Tensor:
    where = where.expand_as(x)
    return (x * where).sum() / where.sum()


def first_sequence(batch: Batch) -> Batch:
    """A copy of the first sequence of a batch."""
    return first_sequences(batch, 1)


def first_sequences(batch: Batch, count: int) -> Batch:
    """A copy of at most the first `count` sequences of a batch."""
    tensors = cast("dict[str, Tensor]", batch)  # a TypedDict gives its values no common type
    return cast("Batch", {name: x[:count].clone() for name, x in tensors.items()})


def dynamic_layers(model: DogeForCausalLM) -> dict[int, DynamicMaskAttention]:
    """The mixers of a decoder that are dynamic mask attention, by layer number."""
    return {i: mixer for i, mixer in enumerate(model.mixers) if isinstance(mixer, DynamicMaskAttention)}


def record_masks(trainer: pl.Trainer, model: DogeForCausalLM, sequence: Batch) -> dict[int, RecordedMask]:
    """Masks of all layers with dynamic mask attention over a batch of one sequence, from one forward pass.

    If layers are sharded among processes, all processes must call it.
    """
    with trainer.precision_plugin.forward_context():
        return masks_over(model, sequence)


def masks_over(model: DogeForCausalLM, sequence: Batch) -> dict[int, RecordedMask]:
    """`record_masks` in the precision of the weights, or of autocast around the call."""

    def record(mixer: DynamicMaskAttention, x: Tensor, packing: Packing | None) -> RecordedMask:
        lifetimes, scores = mixer.lifetimes(x, packing)
        causal = Lifetimes.causal(x.shape[1], x.device, packing=packing)
        return RecordedMask(lifetimes, causal, scores, lifetimes.capacity)

    return _look(model, dynamic_layers(model), sequence, record)


def look_at_layers(
    trainer: pl.Trainer,
    model: DogeForCausalLM,
    layers: Mapping[int, Mixer],
    batch: Batch,
    look: Callable[[Mixer, Tensor, Packing | None], Seen],
) -> dict[int, Seen]:
    """What `look` sees in layers of a model, in one forward pass in evaluation mode.

    If layers are sharded among processes, all processes must call it.

    Args:
        trainer: gives the precision of the pass.
        model: the decoder.
        layers: mixers of its layers, by layer number.
        batch: the batch.
        look: called with the mixer of a layer, its input `[B, N, C]` and the packing.

    Returns:
        The result of each call, by layer number.
    """
    with trainer.precision_plugin.forward_context():
        return _look(model, layers, batch, look)


@torch.no_grad()
def _look(
    model: DogeForCausalLM,
    layers: Mapping[int, Mixer],
    batch: Batch,
    look: Callable[[Mixer, Tensor, Packing | None], Seen],
) -> dict[int, Seen]:
    seen: dict[int, Seen] = {}
    hooks = []
    for i, mixer in layers.items():

        def note(mixer: Mixer, args: tuple, i: int = i) -> None:
            x, packing, *_ = args
            seen[i] = look(mixer, x, packing)

        hooks.append(mixer.register_forward_pre_hook(note))
    try:
        with evaluating(model):
            model(batch["input_ids"], batch.get("documents"), batch.get("padding"))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def check_whole_sequences(callback: pl.Callback, pl_module: pl.LightningModule) -> None:
    """Raise `ValueError` if processes divide sequences, for a callback that looks at whole ones."""
    if (parts := decoder_of(pl_module).parts) > 1:
        raise ValueError(
            f"{type(callback).__name__}: expected whole sequences, got parts in {parts} processes "
            "(context_parallel_size); leave the callback out"
        )


class FirstBatchMonitor(pl.Callback, ABC):
    """Inspects layers at the end of each validation, on the first sequences of its first batch.

    Args:
        sequences: how many sequences of the batch to use.

    Raises:
        ValueError: if the number is below 1.
    """

    def __init__(self, sequences: int = 4) -> None:
        if sequences < 1:
            raise ValueError(f"sequences: expected at least 1, got {sequences}")
        self.sequences = sequences
        self.batch: Batch | None = None

    @abstractmethod
    def layers(self, model: DogeForCausalLM) -> Mapping[int, TokenMixer]:
        """The layers to inspect, by layer number; if there are none, nothing is done."""

    @abstractmethod
    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch) -> None:
        """Inspect the layers with a batch, and log the result."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_whole_sequences(self, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0 and self.layers(decoder_of(pl_module)):
            self.batch = first_sequences(batch, self.sequences)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batch, self.batch = self.batch, None
        if batch is not None and not trainer.sanity_checking:
            self.look(trainer, pl_module, batch)
