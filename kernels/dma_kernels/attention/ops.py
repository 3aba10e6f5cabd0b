"""Attention over lifetimes by Triton kernels: gather into segments, forward, backward, sum of a key's copies.

`fused_attention` calls two custom operations that are opaque to torch.compile; outside it, an autograd function does
the same with less work for the CPU. The backward pass takes five matrix products and no atomics, so the same inputs
give the same bits in every run.

B batch, H query heads, G KV heads, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton_package

from dma_kernels.checks import check_attention_inputs, check_lifetimes, check_no_tangents
from dma_kernels.launching import dispatched, on_device_of_first
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.renamed import taking_renamed
from dma_kernels.segments.slots import SegmentSlots

# What the kernels can do.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@taking_renamed(scores="key_bias")
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    lifetimes: Lifetimes,
    scale: float | None = None,
    segment_length: int | None = None,
    slots: SegmentSlots | None = None,
    *,
    query_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the live keys, with a bias for each key, by Triton kernels.

    It is differentiable in q, k, v and biases, and gives the same bits in every run. A NaN or infinity in v spreads to
    every query for which a kernel loads the key's tile, even to earlier queries of the segment. (If ranks come from
    values, a NaN in v also makes the rank of its key NaN.)

    Args:
        q: `[B, H, N, D]`, float32, bfloat16 or float16; products are accumulated in float32.
        k: `[B, G, N, D]`, H a multiple of G.
        v: `[B, G, N, D]`.
        key_bias: added to the logits of each key, float32 or float64 `[B, G, N]`.
        lifetimes: the mask, for B or 1 sequences and G or 1 KV heads.
        scale: factor of q·k, by default `1 / sqrt(D)`.
        segment_length: S, by default the mask's capacity; rounded up to a multiple of 128.
        slots: `SegmentSlots.of(lifetimes, B, G)`, so that several calls can share it. Nothing checks that it belongs to
            the lifetimes.
        query_bias: added to all logits of a query, float32 or float64 `[B, G, N]`. Softmax cancels it. Its gradient is
            the sum of dS, the gradient of the logits, over the query's keys and the heads of the group. This is 0
            except for rounding errors, and the gradients of key_bias contain the same errors. If key_bias is float32,
            the query bias changes no bit of the output. If key_bias is float64, the query bias of each segment's first
            query is added to the segment's key biases before they are rounded to float32. So if the query bias is minus
            the drift of the queries, key biases are as exact far into a text as at its beginning. Without a query bias,
            float64 key biases are rounded as they are.

    Returns:
        `[B, H, N, D]` in the dtype of q. A query without any key gives 0.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or the kernels do not support them.
    """
    check_attention_inputs(q, k, v, key_bias, query_bias)
    check_lifetimes(lifetimes, k)
    check_kernels_can(q.dtype, q.shape[-1])
    check_no_tangents(q, k, v, key_bias, query_bias)
    if slots is not None and segment_length is not None:
        raise ValueError("expected either segment_length or slots, got both; slots have their own segment length")
    if not q.numel():
        biases = key_bias if query_bias is None else key_bias + query_bias
        return q * (k.sum() + v.sum() + biases.sum()).to(q.dtype)  # empty, and differentiable in all
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    slots = SegmentSlots.of(lifetimes, q.shape[0], k.shape[1], segment_length) if slots is None else slots
    slots.check_fits(q, k)
    if missing := -head_dim % (16 // q.element_size()):  # tensor descriptors step by 16 bytes
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    copies = slots.copies
    attend = attend_slots if dispatched(q, k, v, key_bias, query_bias) else _AttendSlots.apply
    out, *_ = attend(
        q, k, v, key_bias, copies.row, copies.first, copies.slot, slots.birth, slots.death, slots.segment_length, scale,
        query_bias,
    )  # fmt: skip
    return out[..., :head_dim] if missing else out


def check_kernels_can(dtype: torch.dtype, head_dim: int) -> None:
    """Raise `ValueError` for what the kernels cannot do, naming a backend that can."""
    if dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"backend 'triton' computes in float32, bfloat16 or float16, got {dtype}; use backend 'torch' for it"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"backend 'triton' takes head dims up to {MAX_HEAD_DIM}, got {head_dim}; use backend 'torch' for others"
        )


def check_machine(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` for a machine on which the kernels cannot compute in a dtype, naming a backend that can."""
    if not has_triton_package():
        raise ValueError("backend 'triton' needs the package triton; install it, or use backend 'flex' or 'torch'")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError(
                f"backend 'triton' needs a GPU of compute capability 8.0 or newer, got {capability}; "
                "use backend 'torch'"
            )
    elif not (device.type == "cpu" and _interpreted()):
        raise ValueError(
            f"backend 'triton' runs on CUDA, got tensors on {device}; use backend 'torch', or 'flex' to infer on a CPU"
        )
    if dtype == torch.bfloat16 and _interpreted():  # its tl.dot multiplies the bits of bfloat16 as integers
        raise ValueError(
            f"backend 'triton' under Triton's interpreter computes in float32 or float16, got {dtype}; use one of these"
        )


def _interpreted() -> bool:
    """Whether Triton's kernels run under its interpreter."""
    import triton

    return triton.knobs.runtime.interpret


@on_device_of_first
def _attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    row: Tensor,
    first: Tensor,
    slot: Tensor,
    birth: Tensor,
    death: Tensor,
    segment_length: int,
    scale: float,
    query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and log-sum-exp in base 2, and keys, values and saturated biases in segment order, for the backward pass.

    Arguments are as in `fused_attention` and `SegmentSlots`; a head takes a multiple of 16 bytes. The log-sum-exp is
    that of the logits with the returned biases. If key_bias is float64, these biases contain a shift per segment, made
    of query_bias. If key_bias is float32, query_bias is not used, and is an argument only because it has a gradient.
    """
    check_machine(q.device, q.dtype)  # here, since torch.compile cannot trace it
    from dma_kernels.attention.kernels.choose_forward import launch_chosen_forward
    from dma_kernels.segments.gather_kernels import launch_gather_keys

    k_seg, v_seg, bias, base_2 = launch_gather_keys(k, v, key_bias, query_bias, row, segment_length=segment_length)
    out, lse = launch_chosen_forward(
        q, k_seg, v_seg, bias, birth, death, base_2=base_2, scale=scale, segment_length=segment_length
    )
    return out, lse, k_seg, v_seg, bias


attend_slots = torch.library.custom_op("dma_kernels::attend_slots", _attend_slots, mutates_args=())


@on_device_of_first
def _attend_slots_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor,
    slot: Tensor,
    birth: Tensor,
    death: Tensor,
    segment_length: int,
    scale: float,
    *,
    query_bias: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v `[B, G, N, D]`, key_bias `[B, G, N]` and query_bias; k, v and bias are in segment order.

    The gradient of key_bias is float32, or float64 if `wide`. The gradient of query_bias has an entry per query head,
    float32 `[B, H, N]`; it is empty unless `query_bias` is True.
    """
    from dma_kernels.attention.kernels.backward import launch_backward
    from dma_kernels.attention.kernels.common import aligned
    from dma_kernels.segments.sum_kernels import launch_sum_key_gradients

    dquery_bias = _empty_query_bias_gradient(q, query_bias)
    dq, dk, dv, dbias = launch_backward(
        aligned(q), k, v, bias, birth, death, lse, aligned(out), aligned(grad_out), scale=scale,
        segment_length=segment_length, dquery_bias=dquery_bias if query_bias else None,
    )  # fmt: skip
    shape = (q.shape[0], k.shape[1], q.shape[2])
    dk, dv, dbias = launch_sum_key_gradients(dk, dv, dbias, first, slot, shape=shape, wide=wide)
    return dq, dk, dv, dbias, dquery_bias


attend_slots_backward = torch.library.custom_op(
    "dma_kernels::attend_slots_backward", _attend_slots_backward, mutates_args=()
)


@attend_slots.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, row: Tensor, *_: object) -> tuple[Tensor, ...]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    k_seg = k.new_empty(*row.shape, k.shape[-1])
    bias = key_bias.new_empty(row.shape, dtype=torch.float32)
    return _positions_first(q), lse, k_seg, torch.empty_like(k_seg), bias


@attend_slots_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *_: object,
    query_bias: bool = False, wide: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, kv_heads, length = q.shape[0], k.shape[1], q.shape[2]
    dk = k.new_empty(batch, kv_heads, length, q.shape[-1])
    dkey_bias = bias.new_empty(batch, kv_heads, length, dtype=_bias_dtype(wide))
    return _positions_first(q), dk, torch.empty_like(dk), dkey_bias, _empty_query_bias_gradient(q, query_bias)


def _bias_dtype(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _positions_first(q: Tensor) -> Tensor:
    """A new `[B, H, N, D]` tensor, laid out in memory as `[B, N, H, D]`, as the output projection needs it."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _empty_query_bias_gradient(q: Tensor, asked: bool) -> Tensor:
    """A new float32 `[B, H, N]`; if it is not needed, an empty tensor, since an operation cannot return None."""
    return q.new_empty(q.shape[:3] if asked else (0,), dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, _, _, key_bias, _, first, slot, birth, death, ctx.segment_length, ctx.scale, query_bias = inputs
    out, lse, k, v, bias = output
    ctx.wide = key_bias.dtype == torch.float64
    ctx.query_bias_dtype = None if query_bias is None else query_bias.dtype
    ctx.save_for_backward(q, k, v, bias, out, lse, first, slot, birth, death)
    ctx.set_materialize_grads(False)  # only the output has a gradient; make no zeros for the others


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 12
    asked, saved = ctx.needs_input_grad[-1], ctx.saved_tensors  # checkpointing allows only one read
    twice = torch.is_grad_enabled()  # with create_graph, which the operation refuses
    attend_backward = attend_slots_backward if twice or dispatched(grad_out, *saved) else _attend_slots_backward
    *gradients, dquery_bias = attend_backward(
        grad_out, *saved, ctx.segment_length, ctx.scale, query_bias=asked, wide=ctx.wide
    )
    if not asked:
        return *gradients, *[None] * 8
    kv_heads = gradients[1].shape[1]
    return *gradients, *[None] * 7, dquery_bias.unflatten(1, (kv_heads, -1)).sum(2, dtype=ctx.query_bias_dtype)


attend_slots.register_autograd(_backward, setup_context=_save_for_backward)


class _AttendSlots(torch.autograd.Function):
    """`attend_slots` without the dispatcher. With a `setup_context`, PyTorch would inspect signatures at every call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _attend_slots(*inputs)
        _save_for_backward(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_backward)
