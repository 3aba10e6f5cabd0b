"""The loss of labels that can only be copied from beyond a window.

B batch, N length.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dma_kernels import Packing
from dma_lightning.data.base import IGNORE_INDEX, Batch
from dma_lightning.metrics import MeanLoss


def far_copies(
    input_ids: Tensor, window: int, documents: Tensor | None = None, padding: Tensor | None = None, order: int = 4
) -> Tensor:
    """Positions whose last tokens stood in their document before, but not within the window.

    The tokens `input_ids[t - order + 1 .. t]`, all of one document and none of them padding, stand in the same document
    also `d` positions earlier, and the least such d is above the window. The token that followed them there, at
    `t - d + 1`, is what a copy needs; a query that sees the last `window` positions sees it if and only if d is at most
    the window. N-grams are compared themselves, not by hashes, in O(order * B N log(B N)).

    Args:
        input_ids: integers `[B, N]`.
        window: positions that a query sees, its own included; padding counts as positions.
        documents: integer ids `[B, N]`; a document is a run of equal ids.
        padding: bool `[B, N]`, True at padded positions.
        order: how many tokens.

    Returns:
        bool `[B, N]`. That the label is the token that followed there is not asked: it is what a copy would say.

    Raises:
        ValueError: on wrong shapes or dtypes, or numbers below 1.
    """
    _check_numbers(window, order)
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected integers [B, N], got {input_ids.dtype} {list(input_ids.shape)}")
    whole, gram = _grams(input_ids, Packing.of(documents, padding, batch=len(input_ids), like=input_ids), order)
    same, place = gram.flatten().sort(stable=True)  # places of equal n-grams ascend
    far = torch.zeros_like(same, dtype=torch.bool)
    far[place[1:]] = (same[1:] == same[:-1]) & (place.diff() > window)  # the nearest place before is too far away
    return far.view_as(whole) & whole


def _grams(input_ids: Tensor, packing: Packing | None, order: int) -> tuple[Tensor, Tensor]:
    """Which positions end an n-gram of one document without padding, bool `[B, N]`, and numbers of the n-grams, int64.

    Two positions have one number if and only if their n-grams and documents are the same; those without an n-gram share
    no number with the others.
    """
    (batch, length), device, packing = input_ids.shape, input_ids.device, packing or Packing()
    place = torch.arange(length, device=device)
    runs = torch.zeros_like(input_ids) if packing.runs is None else packing.runs
    padding = torch.zeros_like(input_ids, dtype=torch.bool) if packing.padding is None else packing.padding
    document = torch.arange(batch, device=device)[:, None] * length + runs  # a number of its own
    tokens, gram, whole = _numbered(input_ids), document, torch.ones_like(padding)
    for back in range(order):  # one token is added to the n-gram at a time, from the last to the first
        before = (place - back).clamp(min=0)
        whole = whole & (place >= back) & ~padding[:, before] & (document[:, before] == document)
        gram = _numbered(gram * (batch * length) + tokens[:, before])
    return whole, _numbered(gram * 2 + whole)


def _numbered(keys: Tensor) -> Tensor:
    """Integers in the place of keys of any size, ascending from 0, equal where the keys are; int64 of their shape.

    It is `torch.unique(return_inverse=True)`, but does not wait for the device.
    """
    ordered, place = keys.flatten().sort()
    number = torch.zeros_like(ordered, dtype=torch.long)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(number).scatter_(0, place, number).view_as(keys)


class FarCopyMonitor(pl.Callback):
    """Logs the mean validation loss of labels whose last tokens stood in their document before, but beyond a window.

    `far_copies` says which labels these are. Every attention has the figures; to compare attentions, give all of them
    the same window. They are sums over the batches of all processes.

    Args:
        window: positions that a window sees, such as keys that a query keeps.
        order: how many tokens must have stood there before.

    Raises:
        ValueError: if a number is below 1; in validation, for a module that does not return its token losses.
    """

    def __init__(self, window: int, order: int = 4) -> None:
        _check_numbers(window, order)
        self.window, self.order = window, order
        self.loss, self.share = MeanLoss(), MeanLoss()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for metric in (self.loss, self.share):
            metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, Mapping) or "token_losses" not in outputs:
            raise ValueError(
                f"FarCopyMonitor: expected {type(pl_module).__name__}.validation_step to return `token_losses` as that "
                f"of LanguageModel does, got {type(outputs).__name__}; return them or leave the callback out"
            )
        labelled = batch["labels"] != IGNORE_INDEX
        copies = labelled & far_copies(
            batch["input_ids"], self.window, batch.get("documents"), batch.get("padding"), self.order
        )
        nats = outputs["token_losses"].masked_fill(~copies, 0).sum()
        self.loss.update(nats, copies.sum(dtype=nats.dtype))
        self.share.update(copies.sum(dtype=nats.dtype), labelled.sum(dtype=nats.dtype))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = {"val/far_copy_loss": self.loss.compute(), "val/far_copy_share": self.share.compute()}
        pl_module.log_dict(figures, sync_dist=True)  # which all processes know, but Lightning would warn


def _check_numbers(window: int, order: int) -> None:
    for name, value in (("window", window), ("order", order)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
