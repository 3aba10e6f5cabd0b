"""The error that an attention kernel may have: at most twice that of the plain formulas in the same dtype."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dma_kernels import Lifetimes, reference_attention

NAMES = ("out", "dq", "dk", "dv", "dscores")


def plain_results(inputs: list[Tensor], mask: Tensor, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients by the formulas that kernels evaluate: sums in float32, P and dS rounded to the dtype of q.

    Logits and their log-sum-exp are computed, and therefore rounded, in base 2. P is exp2 of their difference. On a
    GPU, exp2 is accurate only to 2 ulp of float32, which is simulated here. The second result holds the same sums over
    absolute values: where terms cancel, float32 loses an eps of these.
    """
    dtype, scale = inputs[0].dtype, inputs[0].shape[-1] ** -0.5
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, bias, grad = (x.to(wide) for x in (*inputs, grad))
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    mask = mask.expand(-1, kv_heads, -1, -1)
    k_full, v_full, bias, mask = (x.repeat_interleave(group, 1) for x in (k, v, bias, mask))

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    base = math.log2(math.e)
    logits = (q @ k_full.mT * (scale * base) + (bias * base)[..., None, :]).masked_fill(~mask, -torch.inf)
    largest = logits.amax(-1, keepdim=True).nan_to_num(neginf=0)
    lse = largest + (logits - largest).exp2().sum(-1, keepdim=True).log2()
    p = (logits - lse.nan_to_num(neginf=0)).exp2()
    if p.is_cuda:
        p *= 1 + 2.0**-22 * torch.randn_like(p).sign()
    out = rounded(rounded(p) @ v_full)
    ds = p * (grad @ v_full.mT - (grad * out).sum(-1, keepdim=True))
    # The error of a logit is an eps of the sum of its terms' sizes. It varies with the order of summation and enters P.
    p_sizes = p * (1 + base * (q.abs() @ k_full.mT.abs() * scale + bias.abs()[..., None, :]))
    ds_sizes = p_sizes * (grad.abs() @ v_full.mT.abs() + (grad * out).abs().sum(-1, keepdim=True))

    def sums(p: Tensor, ds: Tensor, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        by_key = [rounded(ds).mT @ q * scale, rounded(p).mT @ grad, ds.sum(-2)[..., None]]
        dk, dv, dscores = (x.unflatten(1, (kv_heads, group)).sum(2) for x in by_key)
        return [rounded(rounded(p) @ v), rounded(rounded(ds) @ k * scale), rounded(dk), rounded(dv), dscores[..., 0]]

    sizes = sums(p_sizes, ds_sizes, q.abs(), k_full.abs(), v_full.abs(), grad.abs())
    return sums(p, ds, q, k_full, v_full, grad), sizes


def results(
    function: Callable[..., Tensor], inputs: list[Tensor], mask: Lifetimes | Tensor, grad: Tensor, trained: bool = True
) -> list[Tensor]:
    """Output and, if `trained`, the gradients of q, k, v and scores."""
    inputs = [x.detach().requires_grad_(trained) for x in inputs]
    out = function(*inputs, mask)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))] if trained else [out]


def assert_as_exact_as_plain(
    function: Callable[..., Tensor], inputs: list[Tensor], mask: Lifetimes, grad: Tensor, trained: bool = True
) -> None:
    """Errors against the float64 definition are at most twice those of the plain formulas in the same dtype."""
    dense = mask.to_dense()
    exact = results(reference_attention, [x.double() for x in inputs], dense, grad, trained)
    plain, sizes = plain_results(inputs, dense, grad)
    found = results(function, inputs, mask, grad, trained)
    for name, x, y, size, z in zip(NAMES, found, plain, sizes, exact, strict=False):
        assert x.isfinite().all(), name
        error, plain_error = x.double() - z, y.double() - z
        # Always allowed, since plain sums of few terms may be exact by chance: to round the result, and float32 sums.
        least = torch.finfo(x.dtype).eps * z.abs().max() + torch.finfo(torch.float32).eps * size.norm()
        assert error.norm() <= 2 * plain_error.norm() + least, f"{name}: {error.norm()} and {plain_error.norm()}"
        # The largest of many rounding errors scatters more than their norm.
        assert error.abs().max() <= 3 * plain_error.abs().max() + least, name
