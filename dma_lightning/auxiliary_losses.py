"""Losses of individual layers in addition to the main loss, which nobody has to collect.

A layer passes its output through `with_auxiliary_loss`. The backward pass of the main loss then trains the layer's own
loss too. So layers that are compiled or recomputed need not return their losses.

The gradient of an auxiliary loss must be scaled like that of the main loss: by the number of accumulated batches, by
the labels of a batch, by the scaler of 16-mixed. This scaling happens outside the model, in more than one place. So
`lead_auxiliary_losses` puts a hook on the main loss. The gradient that arrives there is the factor itself, and it
arrives before any layer's backward pass begins.

One tensor of this module holds the factor, and an operation that is opaque to torch.compile reads it. If a compiled
layer read the tensor directly, it would do so in its forward pass, before the factor is known, and the tensor could not
change in place before the backward pass. The operation depends on the incoming gradient, so it stays in the backward
pass. It copies from a fixed address, so a CUDA graph of a backward pass reads the value that is held at replay.
"""

from typing import Any

import torch
from torch import Tensor


class _BackwardScale:
    """The factor that scales the backward pass of the main loss, a scalar tensor; 1 unless set."""

    def __init__(self) -> None:
        self.held = torch.ones(())

    @torch.no_grad()
    def set(self, gradient: Tensor) -> None:
        """Store the gradient of the main loss, without waiting for the device."""
        if self.held.device == gradient.device and self.held.dtype == gradient.dtype:
            self.held.copy_(gradient)
        else:
            self.held = gradient.detach().clone()


_scale = _BackwardScale()


def lead_auxiliary_losses(loss: Tensor) -> None:
    """Declare a loss `[]` the main one: auxiliary losses get the scale of its gradient.

    Call it before the loss is scaled. It does nothing for a loss that needs no gradient.
    """
    if loss.requires_grad:
        loss.register_hook(_scale.set)


def end_auxiliary_losses() -> None:
    """Scale auxiliary losses by 1 again, after the backward pass of a main loss."""
    _scale.held.fill_(1)


def with_auxiliary_loss(x: Tensor, loss: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """`x` unchanged; its backward pass also back-propagates `weight · loss`, scaled like the main loss.

    The loss is trained once for each backward pass of x, even if a checkpoint computes the layer again. It is trained
    only if the main loss depends on the returned tensor. Do not compute the loss at all when gradients are off.

    Args:
        x: the tensor that the layer continues with, of any shape.
        loss: floating `[]`.
        weight: its factor, relative to a main loss with factor 1.

    Returns:
        x, the same numbers.

    Raises:
        ValueError: if the loss is not a floating scalar.
    """
    if loss.ndim or not loss.is_floating_point():
        raise ValueError(f"loss: expected a floating scalar, got {loss.dtype} {list(loss.shape)}; take its mean or sum")
    return _WithAuxiliaryLoss.apply(x, loss * weight)


class _WithAuxiliaryLoss(torch.autograd.Function):
    """The identity; its backward pass also gives the loss a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, held_scale(grad, ctx.dtype)


@torch.library.custom_op("dma_lightning::held_scale", mutates_args=())
def held_scale(like: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor as it is when this operation runs: `[]` in the given dtype, on the device of `like`."""
    return _scale.held.to(like.device, dtype, copy=True)


@held_scale.register_fake
def _(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((), dtype=dtype)
