"""The loss of each label, from logits or from what the output head reads.

B batch, N length, C hidden size, V vocabulary, T = B N tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dma_kernels.precision import without_autocast_cache
from dma_lightning.data.base import IGNORE_INDEX

Loss = Callable[[Tensor, Tensor], Tensor]


class TokenScores(NamedTuple):
    """What a model says about the labels of a batch.

    Attributes:
        losses: cross entropy in nats, `[B, N]`; 0 where the label is ignored.
        tokens: the likeliest ones, int64 `[B, N]`; None if nobody asked.
    """

    losses: Tensor
    tokens: Tensor | None


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats of logits `[B, N, V]` at every position, `[B, N]`; 0 where the label is ignored."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view_as(
        labels
    )


def chunked_scores(
    head: nn.Module, x: Tensor, labels: Tensor, chunk: int, predict: bool = False, loss: Loss = token_losses
) -> TokenScores:
    """Losses and likeliest tokens, from the logits of one chunk of tokens at a time.

    The backward pass computes the logits of each chunk again. So memory holds the logits of one chunk, not `[B, N, V]`.
    (`torch.nn.functional.linear_cross_entropy` also works in chunks, but torch 2.11 does not have it, and it does not
    return the likeliest tokens.)

    Args:
        head: maps `[..., C]` to logits `[..., V]`.
        x: the input of the head, `[B, N, C]`.
        labels: int64 `[B, N]`.
        chunk: tokens in each chunk; the last one has the rest of T.
        predict: whether to find the likeliest tokens.
        loss: a function of logits `[1, chunk, V]` and labels `[1, chunk]`.

    Returns:
        The scores. The gradient of float32 weights is summed over chunks in float32, even under autocast.
    """

    def scores(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        with without_autocast_cache(x.device):  # so that the weight's gradient sums over chunks in its own dtype
            logits = head(x)
        return loss(logits, labels), logits.argmax(-1) if predict else None

    parts = zip(*(tokens.flatten(0, 1)[None].split(chunk, dim=1) for tokens in (x, labels)), strict=True)
    if torch.is_grad_enabled() and labels.numel() > chunk:
        found = [checkpoint(scores, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        found = [scores(*part) for part in parts]
    losses = torch.cat([losses for losses, _ in found], dim=1).view_as(labels)
    tokens = [tokens for _, tokens in found if tokens is not None]
    return TokenScores(losses, torch.cat(tokens, dim=1).view_as(labels) if tokens else None)


def check_loss_chunk(chunk: int | None) -> None:
    """Raise `ValueError` unless it is a positive number of tokens, or None."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"loss_chunk: expected a whole number of tokens, at least 1, or null for all, got {chunk!r}")
