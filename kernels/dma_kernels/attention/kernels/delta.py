"""The Triton kernel of D = rowsum(dO · O), which is part of the gradient of the logits: dS = P (dO v - D).

B batch, H query heads, N length, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.primitives import padded_head_dim

_ROWS = 32  # rows of a program


@triton.jit
def _delta_kernel(
    p_out, p_do, p_delta, out_b, out_h, out_n, do_b, do_h, do_n, rows, length, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """D of one tile of rows, which follow their order in memory, [B, N, H]."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_h, o_bn = o_row % heads, o_row // heads
    o_n, o_b = o_bn % length, o_bn // length
    o_d = tl.arange(0, BLOCK_D)
    m_x = (o_row < rows)[:, None] & (o_d < D)[None, :]
    p_x = p_out + (o_b * out_b + o_h * out_h + o_n * out_n)[:, None] + o_d[None, :]
    p_y = p_do + (o_b * do_b + o_h * do_h + o_n * do_n)[:, None] + o_d[None, :]
    b_x, b_y = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32), tl.load(p_y, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_delta + (o_b * heads + o_h) * length + o_n, tl.sum(b_x * b_y, axis=1), mask=o_row < rows)


def launch_delta(out: Tensor, grad_out: Tensor) -> Tensor:
    """rowsum(dO · O), float32 `[B, H, N]`, of an output `[B, H, N, D]` and its gradient, both with stride 1 in D."""
    batch, heads, length, head_dim = out.shape
    delta = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
    rows = delta.numel()
    _delta_kernel[(triton.cdiv(rows, _ROWS),)](
        out, grad_out, delta, *out.stride()[:3], *grad_out.stride()[:3], rows, length, heads,
        D=head_dim, BLOCK_D=padded_head_dim(head_dim), ROWS=_ROWS,
    )  # fmt: skip
    return delta
