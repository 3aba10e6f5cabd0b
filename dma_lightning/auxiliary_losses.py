"""Losses of single layers beside the main loss, which nobody has to collect.

A layer passes its output through `with_auxiliary_loss`, and the backward pass of the main loss trains the layer's own
loss too. So a loss needs no way out of layers that are compiled or computed again.

The gradient of the own loss must be scaled as that of the main loss is: by the number of accumulated batches, by the
labels of a batch, by the scaler of 16-mixed. Who scales does so outside of the model, and more than one does. Hence
nobody is asked: `lead_auxiliary_losses` puts a hook on the main loss, and the gradient that arrives there is the factor
itself. It arrives before any layer's backward begins.

The factor is held in one tensor of this module, which an operation reads that is opaque to torch.compile. A tensor that
a compiled layer read by itself would be read in its forward, when the factor is not known, and could not be changed in
place before its backward. The operation depends on the gradient that comes in, so it cannot move into the forward
either; and it copies from an address that stays, so that a CUDA graph of a backward reads what is held at its replay.
"""

from typing import Any

import torch
from torch import Tensor


class _BackwardScale:
    """The factor by which the backward of the main loss is scaled, a scalar tensor; 1 unless somebody says."""

    def __init__(self) -> None:
        self.held = torch.ones(())

    @torch.no_grad()
    def set(self, gradient: Tensor) -> None:
        """Hold the gradient of the main loss, without waiting for the device."""
        if self.held.device == gradient.device and self.held.dtype == gradient.dtype:
            self.held.copy_(gradient)
        else:
            self.held = gradient.detach().clone()


_scale = _BackwardScale()


def lead_auxiliary_losses(loss: Tensor) -> None:
    """Let a loss `[]` be the main one: auxiliary losses are scaled as its backward pass is.

    Call it before the loss is scaled. A loss that needs no gradient leads nothing.
    """
    if loss.requires_grad:
        loss.register_hook(_scale.set)


def end_auxiliary_losses() -> None:
    """After the backward of a main loss: let those of losses that lead nothing be scaled by 1 again."""
    _scale.held.fill_(1)


def with_auxiliary_loss(x: Tensor, loss: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """`x` unchanged; its backward pass also back-propagates `weight · loss`, scaled as the main loss is.

    The loss is trained once for each backward pass of x, also where a checkpoint computes the layer again. It is
    trained only if the main loss depends on what is returned. Without gradients do not compute it at all.

    Args:
        x: what the layer goes on with, of any shape.
        loss: floating `[]`.
        weight: its factor, beside a main loss with 1.

    Returns:
        x, the same numbers.

    Raises:
        ValueError: if the loss is no floating scalar.
    """
    if loss.ndim or not loss.is_floating_point():
        raise ValueError(f"loss: expected a floating scalar, got {loss.dtype} {list(loss.shape)}; take its mean or sum")
    return _WithAuxiliaryLoss.apply(x, loss * weight)


class _WithAuxiliaryLoss(torch.autograd.Function):
    """The identity, which hands a loss its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, held_scale(grad, ctx.dtype)


@torch.library.custom_op("dma_lightning::held_scale", mutates_args=())
def held_scale(like: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor that is held when this is computed, `[]` in a dtype, on the device of `like`."""
    return _scale.held.to(like.device, dtype, copy=True)


@held_scale.register_fake
def _(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((), dtype=dtype)
