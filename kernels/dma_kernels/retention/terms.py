"""The terms of the retention loss, one for each sampled query.

    fit_t = sum_far target_tj · log p_tj        mass_t = sum_far target_tj

The target of a far key is its share of a query's attention, or its share of the effect on the query's output. The
target has no gradient. p is the softmax of content plus drift over the far keys. The gradient of fit_t with respect to
content_j is `target_tj - mass_t p_tj`.

B batch, H query heads, G KV heads, R = H / G group, N length, M sampled queries, D head dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dma_kernels.attention.ops import check_machine
from dma_kernels.launching import on_device_of_first
from dma_kernels.retention.inputs import NO_QUERY, NO_RUN, TermInputs


class Terms(NamedTuple):
    """The terms of the sampled queries of each KV head, `[B, G, M]`.

    Attributes:
        fit: the logarithm of the prediction, weighted by the target; only it has a gradient, in content.
        mass: the target's sum over far keys.
        has_far: bool; without far keys, fit and mass are 0.
    """

    fit: Tensor
    mass: Tensor
    has_far: Tensor


def retention_terms_reference(inputs: TermInputs) -> Terms:
    """The terms in plain PyTorch, in memory for `[B, H, M, N]`."""
    q, k, values, content, drift, positions, runs, distance = inputs
    seen, far = _seen_and_far(content, positions, runs, distance)
    decay = _decay(content, drift, positions)  # [B, G, M or 1, N]
    target = _target(q, k, decay, seen, values).where(far, 0)  # [B, G, M, N]
    has_far = far.any(-1)  # [B or 1, 1, M]
    foreseen = (content[:, :, None] + decay).where(far, -torch.inf)
    log_p = foreseen.where(has_far[..., None], 0).log_softmax(-1).where(far, 0)  # [B, G, M, N]
    return Terms((target * log_p).sum(-1), target.sum(-1), has_far.expand(len(q), k.shape[1], -1))


@torch.no_grad()
def _seen_and_far(content: Tensor, positions: Tensor, runs: Tensor | None, distance: int) -> tuple[Tensor, Tensor]:
    """Which keys each sampled query may attend to, and which of them are far; bool `[B or 1, 1, M, N]`."""
    age = positions[:, None] - torch.arange(content.shape[-1], device=content.device)  # [M, N]
    seen, far = (age >= 0)[None, None], (age >= distance)[None, None]
    if runs is None:
        return seen, far
    own = runs[0, :, positions]
    own = own.masked_fill(own == NO_RUN, NO_QUERY)[:, None, :, None]
    return seen & (runs[0, :, None, None] == own), far & (runs[1, :, None, None] == own)


@torch.no_grad()
def _decay(content: Tensor, drift: Tensor | None, positions: Tensor) -> Tensor:
    """The decay of each key at each sampled query, in nats, at most 0; `[B, G, M or 1, N]`."""
    if drift is None:
        return torch.zeros_like(content)[:, :, None]
    return (drift[:, :, None] - drift[:, :, positions, None]).to(content.dtype)


@torch.no_grad()
def _target(q: Tensor, k: Tensor, decay: Tensor, seen: Tensor, values: Tensor | None) -> Tensor:
    """The target for all keys that queries see, as a mean over a group's heads, `[B, G, M, N]`.

    NaN for a query that sees no key.
    """
    grouped = q.to(decay.dtype).unflatten(1, (k.shape[1], -1))  # [B, G, R, M, D]
    logits = grouped @ k.to(decay.dtype)[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, G, R, M, N]
    attention = (logits + decay[:, :, None]).where(seen[:, :, None], -torch.inf).softmax(-1)
    if values is None:
        return attention.mean(2)
    v, shared = values.to(decay.dtype), seen.to(decay.dtype)
    mean = shared / shared.sum(-1, keepdim=True) @ v  # [B, G, M, D]
    square = v.square().sum(-1)[:, :, None] - 2 * mean @ v.mT + mean.square().sum(-1, keepdim=True)
    effect = attention * square.clamp(min=0).sqrt()[:, :, None]  # [B, G, R, M, N]
    total = effect.sum(-1, keepdim=True)
    return (effect / total.where(total != 0, 1)).mean(2)


def retention_terms(inputs: TermInputs) -> Terms:
    """The terms by Triton kernels, in memory that is linear in N; content must be float32, and D at most 256."""
    fit, stats, _ = head_terms(*inputs)
    fit, mass, far = (x.unflatten(1, (inputs.k.shape[1], -1)) for x in (fit, stats[2], stats[3]))
    return Terms(fit.mean(2), mass.mean(2), far[:, :, 0] != -torch.inf)


@torch.library.custom_op("dma_kernels::retention_terms", mutates_args=())
@on_device_of_first
def head_terms(
    q: Tensor,
    k: Tensor,
    values: Tensor | None,
    content: Tensor,
    drift: Tensor | None,
    positions: Tensor,
    runs: Tensor | None,
    distance: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit of each query head, and what its gradient needs: statistics of softmaxes, and means of values.

    Arguments are those of `TermInputs`.

    Returns:
        Fit, float32 `[B, H, M]`. Then four statistics, float32 `[4, B, H, M]`: the log-sum-exp of the logits in base 2,
        the sum of the effects (of attention if there are no values), the mass, and the log-sum-exp of the prediction
        in base 2, -inf without far keys. Then the mean of the values that each query sees, as the sum of two tensors
        in their dtype, `[2, B, G, M, D]`; empty if there are no values.
    """
    check_machine(q.device, q.dtype)  # here, since torch.compile cannot trace it
    from dma_kernels.retention.kernels import launch_head_terms

    return launch_head_terms(TermInputs(q, k, values, content, drift, positions, runs, distance))


@torch.library.custom_op("dma_kernels::retention_gradient", mutates_args=())
@on_device_of_first
def content_gradient(
    grad_fit: Tensor,
    q: Tensor,
    k: Tensor,
    values: Tensor | None,
    content: Tensor,
    drift: Tensor | None,
    positions: Tensor,
    runs: Tensor | None,
    stats: Tensor,
    mean: Tensor,
    distance: int,
) -> Tensor:
    """Gradient of contents, float32 `[B, G, N]`; arguments as in `TermInputs`, and what `head_terms` returns."""
    from dma_kernels.retention.gradient_kernel import launch_content_gradient

    inputs = TermInputs(q, k, values, content, drift, positions, runs, distance)
    return launch_content_gradient(grad_fit, inputs, stats, mean)


@head_terms.register_fake
def _(q: Tensor, k: Tensor, values: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    fit = q.new_empty(q.shape[:3], dtype=torch.float32)
    shape = (2, q.shape[0], k.shape[1], *q.shape[2:])
    return fit, fit.new_empty(4, *fit.shape), k.new_empty((0,) if values is None else shape)


@content_gradient.register_fake
def _(grad_fit: Tensor, q: Tensor, k: Tensor, values: Tensor | None, content: Tensor, *_: object) -> Tensor:
    return torch.empty_like(content, dtype=torch.float32, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.distance = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # only the fit has a gradient


def _backward(ctx: Any, grad_fit: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_fit is None:
        return (None,) * 8
    return None, None, None, content_gradient(grad_fit, *ctx.saved_tensors, ctx.distance), *[None] * 4


head_terms.register_autograd(_backward, setup_context=_save_for_backward)
