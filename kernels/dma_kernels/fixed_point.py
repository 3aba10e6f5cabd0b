"""Ranks with a drift as integers, so that their order is exact in a text of any length.

    rank_j = content_j + D_j        D_j = d_1 + ... + d_j, d_l >= 0

Near 1,000,000 nats, neighboring float32 numbers are 0.06 nats apart, so keys that differ by less would count as equal.
So contents and steps are rounded to whole units of 2^-32 nats, half to even, and added up in int64 (Q31.32). A sum of
integers does not depend on how it is divided. So a whole sequence, its chunks, and its tokens one by one give the same
ranks from the same contents and steps.

- *Range.* Contents and D are limited to 2^29 nats, about 5.4e8. D reaches that after 67 million tokens at 8 nats each.
  Larger numbers and infinities become that bound. Keys whose D has reached it differ only in content.
- *Small numbers.* A step below 2^-33 nats counts as 0. Equal ranks give a sliding window, since the later key wins.
- *NaN.* A NaN content becomes the largest integer, so its key is selected and the NaN shows in the loss. A NaN step
  counts as 0 here. Code that makes biases out of steps must let the NaN show in the biases.

B batch, G KV heads, N length.
"""

from typing import Any

import torch
from torch import Tensor

from dma_kernels.launching import call, register_launch
from dma_kernels.units import LARGEST, NAN_RANK, UNIT, in_units


def drifts_reference(steps: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`drifts` in plain PyTorch, without a gradient."""
    units = in_units(steps).clamp(min=0).cumsum(-1)
    beyond = (units < 0) | (units > LARGEST)  # the first sum that overflows is negative
    units = units.masked_fill(beyond.int().cummax(-1).values.bool(), LARGEST)
    units = units if start is None else (units + start[..., None]).clamp(max=LARGEST)
    broken = steps.isnan().int().cummax(-1).values.bool()
    return units, (units.double() * UNIT).masked_fill(broken, torch.nan)


@torch.library.custom_op("dma_kernels::drifts", mutates_args=())
def drifts(steps: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """D of every position.

    On CUDA, Triton kernels compute it. It is a custom operation, since torch.compile cannot compile all such sums for
    GPUs.

    Args:
        steps: d in nats, at least 0, floating `[..., N]`; NaN and negative steps count as 0.
        start: D of the position before the first, in units, int64 `[...]`; by default 0.

    Returns:
        D in units, int64 `[..., N]`, ascending; and D in nats, float64 `[..., N]`. The second is differentiable in the
        steps, and NaN from the first NaN step on.
    """
    return drifts_reference(steps, start)


@register_launch(drifts, without_triton=drifts_reference)
def _(steps: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from dma_kernels.fixed_point_kernels import launch_drifts

    return launch_drifts(steps, start)


@drifts.register_fake
def _(steps: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    units = torch.empty_like(steps, dtype=torch.int64, memory_format=torch.contiguous_format)
    return units, torch.empty_like(units, dtype=torch.float64)


def suffix_sums_reference(x: Tensor) -> Tensor:
    """`suffix_sums` in plain PyTorch."""
    return x.double().flip(-1).cumsum(-1).flip(-1)


@torch.library.custom_op("dma_kernels::suffix_sums", mutates_args=())
def suffix_sums(x: Tensor) -> Tensor:
    """For each number, the sum of it and all later numbers of its row; floating `[..., N]`, summed in float64."""
    return suffix_sums_reference(x)


@register_launch(suffix_sums, without_triton=suffix_sums_reference)
def _(x: Tensor) -> Tensor:
    from dma_kernels.fixed_point_kernels import launch_suffix_sums

    return launch_suffix_sums(x)


@suffix_sums.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float64, memory_format=torch.contiguous_format)


def _note_dtype(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _gradient_of_steps(ctx: Any, _: None, gradient: Tensor | None) -> tuple[Tensor | None, None]:
    return None if gradient is None else suffix_sums(gradient).to(ctx.dtype), None


drifts.register_autograd(_gradient_of_steps, setup_context=_note_dtype)


def drift_sums(steps: Tensor, start: Tensor | None = None) -> Tensor:
    """D of every position in units; arguments as in `drifts`."""
    return call(drifts, steps.detach(), start)[0]


def drifted_ranks(content: Tensor, drift: Tensor) -> Tensor:
    """int64 ranks from contents in nats and D in units, all of the same shape."""
    return (in_units(content) + drift).masked_fill(content.isnan(), NAN_RANK)


def fixed_point_ranks_reference(content: Tensor, steps: Tensor) -> Tensor:
    """`fixed_point_ranks` in plain PyTorch."""
    return drifted_ranks(content, drifts_reference(steps)[0])


@torch.library.custom_op("dma_kernels::fixed_point_ranks", mutates_args=())
def fixed_point_ranks(content: Tensor, steps: Tensor) -> Tensor:
    """int64 ranks from contents and steps in nats, floating `[..., N]` each; on CUDA in two launches."""
    return fixed_point_ranks_reference(content, steps)


@register_launch(fixed_point_ranks, without_triton=fixed_point_ranks_reference)
def _(content: Tensor, steps: Tensor) -> Tensor:
    from dma_kernels.fixed_point_kernels import launch_ranks

    return launch_ranks(content, steps)


@fixed_point_ranks.register_fake
def _(content: Tensor, steps: Tensor) -> Tensor:
    return torch.empty_like(steps, dtype=torch.int64, memory_format=torch.contiguous_format)


def ranks_of_steps(content: Tensor, steps: Tensor, padding: Tensor | None = None) -> Tensor:
    """int64 ranks `[B, G, N]` from contents and steps.

    Args:
        content: floating `[B, G, N]`, in nats.
        steps: floating, same shape, in nats, at least 0.
        padding: bool `[B, N]`, True where steps do not count.

    Raises:
        ValueError: if contents or steps are not floating, if they differ in shape or device, or if a step is negative.
            The check for negative steps waits for the device. Under torch.compile, and while a CUDA graph is captured,
            it cannot wait, so there is no check, and negative steps count as 0.
    """
    if not content.is_floating_point():
        raise ValueError(
            f"ranks: expected a floating dtype, in nats, when a drift is given, got {content.dtype}; integer ranks "
            "must already include the drift"
        )
    if steps.shape != content.shape or steps.device != content.device or not steps.is_floating_point():
        raise ValueError(
            f"drift: expected floating {list(content.shape)} on {content.device}, a step in nats for each key, got "
            f"{steps.dtype} {list(steps.shape)} on {steps.device}"
        )
    if padding is not None:
        steps = steps.masked_fill(padding[:, None], 0)
    recorded = torch.compiler.is_compiling() or (steps.is_cuda and torch.cuda.is_current_stream_capturing())
    if not recorded and (steps < 0).any():
        raise ValueError(f"drift: expected steps of at least 0 nats, got {steps.min().item():g}; clamp them")
    return call(fixed_point_ranks, content.detach(), steps.detach())
