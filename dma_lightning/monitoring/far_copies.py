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
from dma_lightning.monitoring.recording import check_whole_sequences


def far_copies(
    input_ids: Tensor, window: int, documents: Tensor | None = None, padding: Tensor | None = None, order: int = 4
) -> Tensor:
    """Positions whose last tokens occurred earlier in their document, but not within the window.

    The tokens `input_ids[t - order + 1 .. t]`, all in one document and none of them padding, also occur `d` positions
    earlier in that document, and the smallest such d is larger than the window. A copy needs the token that followed
    them there, at `t - d + 1`; a query that sees the last `window` positions sees it if and only if d is at most the
    window. The n-grams themselves are compared, not hashes, in O(order * B N log(B N)).

    Args:
        input_ids: integers `[B, N]`.
        window: number of positions that a query sees, its own included; padding counts as positions.
        documents: integer ids `[B, N]`; a document is a run of equal ids.
        padding: bool `[B, N]`, True at padded positions.
        order: length of the n-gram in tokens.

    Returns:
        bool `[B, N]`. The label may differ from the token that followed there, which is what a copy would predict.

    Raises:
        ValueError: on wrong shapes or dtypes, or numbers below 1.
    """
    _check_numbers(window, order)
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected integers [B, N], got {input_ids.dtype} {list(input_ids.shape)}")
    whole, gram = _grams(input_ids, Packing.of(documents, padding, batch=len(input_ids), like=input_ids), order)
    same, place = gram.flatten().sort(stable=True)  # places of equal n-grams ascend
    far = torch.zeros_like(same, dtype=torch.bool)
    far[place[1:]] = (same[1:] == same[:-1]) & (place.diff() > window)  # the nearest earlier place is too far back
    return far.view_as(whole) & whole


def _grams(input_ids: Tensor, packing: Packing | None, order: int) -> tuple[Tensor, Tensor]:
    """Which positions end an n-gram of one document without padding, bool `[B, N]`, and ids of the n-grams, int64.

    Two positions have the same id if and only if their n-grams and documents are the same. Positions without an n-gram
    share no id with positions that have one.
    """
    (batch, length), device, packing = input_ids.shape, input_ids.device, packing or Packing()
    place = torch.arange(length, device=device)
    runs = torch.zeros_like(input_ids) if packing.runs is None else packing.runs
    padding = torch.zeros_like(input_ids, dtype=torch.bool) if packing.padding is None else packing.padding
    document = torch.arange(batch, device=device)[:, None] * length + runs  # an id unique in the batch
    tokens, gram, whole = _numbered(input_ids), document, torch.ones_like(padding)
    for back in range(order):  # add one token to the n-gram at a time, from the last to the first
        before = (place - back).clamp(min=0)
        whole = whole & (place >= back) & ~padding[:, before] & (document[:, before] == document)
        gram = _numbered(gram * (batch * length) + tokens[:, before])
    return whole, _numbered(gram * 2 + whole)


def _numbered(keys: Tensor) -> Tensor:
    """Replace keys of any size by ids that ascend from 0 and are equal where the keys are; int64 of the same shape.

    Like `torch.unique(return_inverse=True)`, but without waiting for the device.
    """
    ordered, place = keys.flatten().sort()
    number = torch.zeros_like(ordered, dtype=torch.long)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(number).scatter_(0, place, number).view_as(keys)


class FarCopyMonitor(pl.Callback):
    """Logs the mean validation loss of labels whose last tokens occurred earlier in their document, beyond a window.

    `far_copies` defines these labels. All attentions get the figures; give all of them the same window to compare
    them. The figures are computed from sums over the batches of all processes.

    Args:
        window: number of positions in the window, such as the number of keys that a query keeps.
        order: how many last tokens must have occurred.

    Raises:
        ValueError: if a number is below 1; in validation, if the module does not return its token losses.
    """

    def __init__(self, window: int, order: int = 4) -> None:
        _check_numbers(window, order)
        self.window, self.order = window, order
        self.loss, self.share = MeanLoss(), MeanLoss()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_whole_sequences(self, pl_module)

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
                f"FarCopyMonitor: expected {type(pl_module).__name__}.validation_step to return `token_losses`, as "
                f"LanguageModel does, got {type(outputs).__name__}; return them or leave the callback out"
            )
        labeled = batch["labels"] != IGNORE_INDEX
        copies = labeled & far_copies(
            batch["input_ids"], self.window, batch.get("documents"), batch.get("padding"), self.order
        )
        nats = outputs["token_losses"].masked_fill(~copies, 0).sum()
        self.loss.update(nats, copies.sum(dtype=nats.dtype))
        self.share.update(copies.sum(dtype=nats.dtype), labeled.sum(dtype=nats.dtype))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = {"val/far_copy_loss": self.loss.compute(), "val/far_copy_share": self.share.compute()}
        pl_module.log_dict(figures, sync_dist=True)  # all processes have the same figures; this avoids a warning


def _check_numbers(window: int, order: int) -> None:
    for name, value in (("window", window), ("order", order)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
