"""Attention over lifetimes as one compiled FlexAttention call, with segments as its batch.

B batch, H query heads, G KV heads, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dma_flex.mods import key_bias_score_mod
from dma_flex.segment_plan import FlexPlan
from dma_kernels import Lifetimes
from dma_kernels.attention.key_gradients import key_gradients
from dma_kernels.checks import check_attention_inputs, check_lifetimes
from dma_kernels.precision import without_autocast
from dma_kernels.renamed import taking_renamed
from dma_kernels.segments.gather import sum_copies


@taking_renamed(scores="key_bias")
def flex_segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    lifetimes: Lifetimes,
    scale: float | None = None,
    segment_length: int | None = None,
    plan: FlexPlan | None = None,
    *,
    query_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the live keys, with a bias for each key, by FlexAttention.

    It trains on CUDA, where it is differentiable in q, k, v and key_bias, and infers on CUDA and CPU. The first call
    with new shapes compiles.

    Args:
        q: `[B, H, N, D]`, float32, bfloat16 or float16; products are accumulated in float32.
        k: `[B, G, N, D]`, H a multiple of G.
        v: `[B, G, N, D]`.
        key_bias: added to the logits of each key, float32 or float64 `[B, G, N]`.
        lifetimes: the mask, for B or 1 sequences and G or 1 KV heads.
        scale: factor of q·k, by default `1 / sqrt(D)`.
        segment_length: S, rounded up to a multiple of 128; by default about the mask's capacity.
        plan: `FlexPlan.of` these lifetimes, so that several calls can share it. Nothing checks that it belongs to
            the lifetimes.
        query_bias: added to all logits of a query, float32 or float64 `[B, G, N]`. Softmax cancels it. But if key_bias
            is float64, the query bias of each segment's first query is added to the key biases before they are rounded
            to float32. It must not require a gradient, which FlexAttention does not give; the backends `triton` and
            `torch` do.

    Returns:
        `[B, H, N, D]` in the dtype of q. A query without any key gives 0.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or FlexAttention does not support them.
        RuntimeError: at torch.compile's recompile limit, which would otherwise lead to a dense O(N²) run.
    """
    if query_bias is not None and query_bias.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"query_bias: backend 'flex' expected one without a gradient, got {list(query_bias.shape)} that requires "
            "one; use backend 'triton' or 'torch'"
        )
    check_attention_inputs(q, k, v, key_bias, query_bias)
    check_lifetimes(lifetimes, k)
    _check_flex_can(q, k, v, key_bias)
    if plan is not None and segment_length is not None:
        raise ValueError("expected either segment_length or plan, got both; a plan has its own segment length")
    (batch, heads, length), kv_heads = q.shape[:3], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if batch == 0:
        return q * (k.sum() + v.sum() + key_bias.sum()).to(q.dtype)  # empty, and differentiable in all
    plan = FlexPlan.of(lifetimes, batch, heads, kv_heads, segment_length) if plan is None else plan
    plan.check_fits(q, k)
    _check_grid(plan, q)
    # Outside the compiled function, so that all lengths of one class share it.
    q, k, v, key_bias = (plan.slots.fill_up(x) for x in (q, k, v, key_bias))
    if query_bias is not None:  # float32 biases do not need it, and leaving it out saves a second compilation
        query_bias = plan.slots.fill_up(query_bias) if key_bias.dtype == torch.float64 else None
    with without_autocast(q.device):
        if torch.compiler.is_compiling():
            return _attend(q, k, v, key_bias, query_bias, plan, scale)[:, :, :length]
        with told_recompile_limit(q):
            return _compiled_attend()(q, k, v, key_bias, query_bias, plan, scale)[:, :, :length]


@contextmanager
def told_recompile_limit(q: Tensor) -> Iterator[None]:
    """A context in which the error at torch.compile's limit says what to do."""
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise RuntimeError(
            "backend 'flex' has been compiled for as many shapes, dtypes and modes as "
            f"torch._dynamo.config.recompile_limit = {torch._dynamo.config.recompile_limit} allows, "
            f"and q {list(q.shape)} in {q.dtype} needs one more; pad to fewer lengths, or raise the limit"
        ) from error


def _attend(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, query_bias: Tensor | None, plan: FlexPlan, scale: float
) -> Tensor:
    """Attend over segments, `[B, H, T * S, D]`."""
    if not q.is_cuda:
        return _attend_on_cpu(q, k, v, key_bias, query_bias, plan, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, key_bias)):
        return _attend_with_gradients(q, k, v, key_bias, query_bias, plan, scale)
    slots = plan.slots
    q_seg, k_seg, v_seg = slots.split_queries(q), slots.gather(k), slots.gather(v)
    arguments = _flex_arguments(q, k, slots.gather_biases(key_bias, query_bias), plan, scale)
    return slots.join_queries(flex_attention(q_seg, k_seg, v_seg, **arguments))


def _attend_with_gradients(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, query_bias: Tensor | None, plan: FlexPlan, scale: float
) -> Tensor:
    """`_attend` in training: FlexAttention takes keys, values and bias as constants, and computes only dq."""
    slots = plan.slots
    q_seg, k_seg, v_seg = slots.split_queries(q), slots.gather(k), slots.gather(v)
    bias, copies = slots.gather_biases(key_bias.detach(), query_bias), slots.copies
    arguments = _flex_arguments(q, k, bias, plan, scale) | {"block_mask": _for_query_gradient(plan.block_mask)}
    out, aux = flex_attention(q_seg, k_seg.detach(), v_seg.detach(), **arguments, return_aux=AuxRequest(lse=True))
    out = _WithKeyGradients.apply(
        out, k_seg, v_seg, key_bias, q_seg.detach(), bias, slots.birth, slots.death, aux.lse.detach(), scale,
        copies.row, copies.first, copies.slot,
    )  # fmt: skip
    return slots.join_queries(out)


def _attend_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, query_bias: Tensor | None, plan: FlexPlan, scale: float
) -> Tensor:
    """`_attend` on a CPU, without gradients, and with NaN made visible.

    FlexAttention's CPU kernel loses NaN logits in the maximum of a row, and returns 0. So keys that are not finite, or
    have a bias of NaN, get an infinite bias. Queries that are not finite get an output of NaN.
    """
    broken = ~q.isfinite().all(-1, keepdim=True)
    bias = torch.where(k.isfinite().all(-1) & ~key_bias.isnan(), key_bias, torch.inf)
    slots = plan.slots
    q_seg = _materialize(slots.split_queries(q.nan_to_num()))
    k_seg, v_seg = slots.gather(k.nan_to_num()), slots.gather(v)
    arguments = _flex_arguments(q, k, slots.gather_biases(bias, query_bias), plan, scale)
    out = _materialize(flex_attention(q_seg, k_seg, v_seg, **arguments))
    return slots.join_queries(out).masked_fill(broken, torch.nan)


def _flex_arguments(q: Tensor, k: Tensor, bias: Tensor, plan: FlexPlan, scale: float) -> dict[str, Any]:
    """The arguments that all calls of FlexAttention here share."""
    return {
        "score_mod": key_bias_score_mod(bias, q.shape[1]),
        "block_mask": plan.block_mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "kernel_options": _kernel_options(q),
    }


@cache
def _compiled_attend() -> Callable[..., Tensor]:
    """`_attend`, compiled; made on first use, since it loads torch's compiler and Triton."""
    # With fullgraph, the recompile limit raises. Otherwise torch.compile would fall back to O(N²) in eager mode.
    return torch.compile(_attend, fullgraph=True, dynamic=False)


@torch.library.custom_op("dma_flex::materialize", mutates_args=())
def _materialize(x: Tensor) -> Tensor:
    """A copy that the compiler cannot fuse: on a CPU, it fails to fuse FlexAttention with the code around it."""
    return x.clone(memory_format=torch.contiguous_format)


@_materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _WithKeyGradients(torch.autograd.Function):
    """Adds the gradients of keys, values and bias to the output of an attention that took them as constants.

    FlexAttention's own gradient of a captured bias makes one atomic addition per pair of query and key, and costs as
    much as the rest of its backward. So FlexAttention computes dq alone, and one key-major kernel computes the rest.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, q: Tensor, bias: Tensor, birth: Tensor,
        death: Tensor, lse: Tensor, scale: float, row: Tensor, first: Tensor, slot: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, bias, birth, death, lse, out, row, first, slot)
        ctx.scale, ctx.shape, ctx.bias_dtype = scale, [*key_bias.shape, 1], key_bias.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, row, first, slot = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        delta = (grad.to(wide) * out.to(wide)).sum(-1)  # [Z, H, S]
        dk, dv, dbias = key_gradients(*inputs, delta, grad, ctx.scale)
        dkey_bias = sum_copies(dbias[..., None].to(ctx.bias_dtype), row, first, slot, ctx.shape).squeeze(-1)
        return grad, dk, dv, dkey_bias, *[None] * 9


def _for_query_gradient(mask: BlockMask) -> BlockMask:
    """The same mask, but with empty tables by keys: FlexAttention's backward then computes dq and skips dk and dv."""
    assert mask.q_num_blocks is not None  # the mask comes from `mask_of_tables`
    none = torch.zeros_like(mask.q_num_blocks)
    return BlockMask(
        seq_lengths=mask.seq_lengths,
        kv_num_blocks=mask.kv_num_blocks,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_num_blocks,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=none,
        q_indices=mask.q_indices,
        full_q_num_blocks=none,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
    )


def _kernel_options(q: Tensor) -> dict[str, int]:
    """Tiles of the forward kernel, for cases in which they are faster than FlexAttention's own on an H200."""
    if not q.is_cuda or q.dtype == torch.float32 or q.shape[-1] > 128:
        return {}
    columns, stages = (64, 2) if q.shape[-1] <= 64 else (32, 3)
    return {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": columns, "fwd_num_warps": 4, "fwd_num_stages": stages}


def _check_grid(plan: FlexPlan, q: Tensor) -> None:
    """Raise `ValueError` if there are more segments than FlexAttention's CUDA kernels can take as a batch."""
    segments = plan.slots.birth.shape[0]
    if q.is_cuda and segments > 65_535:
        raise ValueError(
            f"backend 'flex' takes 65535 segments at most, got {segments} of {plan.slots.segment_length} positions; "
            "set a larger segment_length, or use a smaller batch"
        )


def _check_flex_can(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> None:
    """Raise `ValueError` for what FlexAttention cannot do, naming the backend that can."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"backend 'flex' computes in float32, bfloat16 or float16, got {q.dtype}; use backend 'torch' for it"
        )
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"backend 'flex' runs on CUDA and CPU, got tensors on {q.device}; use backend 'torch' there")
    if q.is_cuda and not 16 <= q.shape[-1] <= 256:
        raise ValueError(
            f"backend 'flex' needs a head dim from 16 to 256 on CUDA, got {q.shape[-1]}; use backend 'torch' for it"
        )
    check_differentiable(q, k, v, key_bias)


def check_differentiable(q: Tensor, *others: Tensor) -> None:
    """Raise `ValueError` if a gradient is needed where FlexAttention has none."""
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, *others)):
        raise ValueError(
            f"backend 'flex' trains on CUDA only, got tensors on {q.device} that require a gradient; "
            "use backend 'torch' to train here, or torch.no_grad() to infer"
        )
