"""A linear map from the layer's input to a few numbers for each position, such as gates.

The numbers are added up over a whole text, so they are computed in at least float32. GPUs have no fast matrix product
in float32 for so few columns. So under torch.compile, the map is a sum of products. Inductor fuses it, so it reads the
input in its own dtype and stores no products; a backend that does not fuse stores `B N G C` of them.

B batch, N length, C hidden size, G KV heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.precision import without_autocast


def narrow_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in at least float32, `[B, N, G]`, for x `[B, N, C]` and weight `[G, C]`; also under autocast."""
    with without_autocast(x.device):
        return _NarrowLinear.apply(x, weight)


class _NarrowLinear(torch.autograd.Function):
    """The map and its gradients, so that torch.compile does not derive the gradients from the sum of products."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = weight.to(dtype)
        if torch.compiler.is_compiling():
            return (x[..., None, :].to(dtype) * weight).sum(-1)
        return F.linear(x.to(dtype), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        if torch.compiler.is_compiling():  # the gradient of a weight has the precision of x, as in other linear layers
            grad_x = (grad[..., None] * weight).sum(-2).to(x.dtype)
            return grad_x, (grad_rows.to(x.dtype).mT @ rows).to(weight.dtype)
        with without_autocast(x.device):
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            return grad_x, (grad_rows.mT @ rows.to(grad.dtype)).to(weight.dtype)
