"""A narrow linear map equals `F.linear` in float32 or more, in output and gradients, eagerly and compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dma_lightning.mixers.narrow_linear import narrow_linear

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def results(function: object, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    out = function(x, weight)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(out.dtype))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_a_linear_map(dtype: torch.dtype, compiled: bool, device: str) -> None:
    torch.compiler.reset()
    dtype_of_weight = torch.promote_types(dtype, torch.float32)
    x, weight = torch.randn(2, 37, 50, device=device).to(dtype), torch.randn(3, 50, device=device).to(dtype_of_weight)
    grad = torch.randn(2, 37, 3, device=device)
    function = torch.compile(narrow_linear, fullgraph=True) if compiled else narrow_linear
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, *gradients = results(function, x, weight, grad)
    expected, *exact = results(F.linear, x.double(), weight.double(), grad)
    eps = torch.finfo(dtype_of_weight).eps
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=50 * eps * 20)
    assert out.dtype == dtype_of_weight
    for found, right, size in zip(gradients, exact, (x, weight), strict=True):
        assert found.dtype == size.dtype
        rounding = max(torch.finfo(dtype).eps, 100 * eps) if compiled or size is x else 100 * eps
        assert (found.double() - right).norm() <= rounding * right.norm()


def test_an_input_without_a_gradient(device: str) -> None:
    linear = nn.Linear(16, 2, bias=False, device=device)
    x = torch.randn(1, 5, 16, device=device)
    (found,) = torch.autograd.grad(narrow_linear(x, linear.weight).square().sum(), [linear.weight])
    (expected,) = torch.autograd.grad(linear(x).square().sum(), [linear.weight])
    torch.testing.assert_close(found, expected)


def test_a_second_gradient(device: str) -> None:
    x, weight = (
        torch.randn(shape, dtype=torch.float64, device=device).requires_grad_() for shape in ((1, 4, 6), (2, 6))
    )
    assert torch.autograd.gradgradcheck(narrow_linear, (x, weight))
