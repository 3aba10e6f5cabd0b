"""Code that several kernels share: logits, the running softmax, and pointers to queries.

Logits are in base 2. A running softmax holds the weighted sum of values, the maximum of the logits so far, and the sum
of their weights. Both sums are relative to that maximum.

Rows are queries, M of them; K keys of a tile, D head dim, P parts.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_pointers(p_x, i_b, o_h, o_n, stride_b, stride_h, stride_n, BLOCK_D: tl.constexpr):
    """Pointers to the vectors of `[B, H, N, D]` that belong to the rows, [M, BLOCK_D]."""
    o_x = i_b * stride_b + o_h.to(tl.int64) * stride_h + o_n.to(tl.int64) * stride_n
    return p_x + o_x[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def scaled_products(b_x, b_y, scale, PRECISION: tl.constexpr):
    """Logits without biases, [M, K], for each pair of a row of `b_x` [M, D] and a row of `b_y` [K, D]."""
    return tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION) * (scale * LOG2_E)


@triton.jit
def finite_shift(b_max):
    """The maximum or log-sum-exp to subtract from logits; 0 if no key is seen, so that P is 0 and not NaN."""
    return tl.where(b_max == -float("inf"), 0.0, b_max)


@triton.jit
def online_softmax_step(b_max, b_sum, b_logits):
    """Add logits [M, K] to a running softmax: returns their weights, the decay of old sums, and new maximum and sum."""
    b_new = tl.maximum(b_max, tl.max(b_logits, axis=1))
    b_shift = finite_shift(b_new)
    b_p = tl.exp2(b_logits - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    return b_p, b_decay, b_new, b_sum * b_decay + tl.sum(b_p, axis=1)


@triton.jit
def add_values(b_out, b_p, b_decay, b_v, PRECISION: tl.constexpr):
    """Decay the sum of values, and add the values [K, D] of a softmax step. Load them after it, to overlap both."""
    return tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision=PRECISION)


@triton.jit
def merge_parts(b_out, b_max, b_sum, b_outs, b_maxs, b_sums):
    """Merge a running softmax [M, D], [M], [M] with those of other keys, [P, M, D], [P, M], [P, M]."""
    b_new = tl.maximum(b_max, tl.max(b_maxs, axis=0))
    b_shift = finite_shift(b_new)
    b_weight, b_decay = tl.exp2(b_maxs - b_shift[None, :]), tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_sums * b_weight, axis=0)
    b_out = b_out * b_decay[:, None] + tl.sum(b_outs * b_weight[:, :, None], axis=0)
    return b_out, b_new, b_sum


@triton.jit
def normalized(b_out, b_sum):
    """The output of a running softmax; 0 in rows that have seen nothing."""
    return b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]


@triton.jit
def log_sum_exp(b_max, b_sum):
    """The log-sum-exp of a running softmax; -inf in rows that have seen nothing."""
    return tl.where(b_sum == 0.0, -float("inf"), b_max + tl.log2(b_sum))


def padded_head_dim(head_dim: int) -> int:
    """The head dim of tiles in kernels: the smallest power of two that is at least `head_dim` and at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def float32_precision() -> str:
    """`ieee` or `tf32`, from torch's settings, as FlexAttention's own kernels choose it."""
    setting = torch.backends.cuda.matmul.fp32_precision
    exact = torch.get_float32_matmul_precision() == "highest" if setting == "none" else setting == "ieee"
    return "ieee" if exact else "tf32"
