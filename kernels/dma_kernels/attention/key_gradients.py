"""Gradients of keys, values and key biases of an attention over intervals, in one key-major pass.

If the backward pass of an attention kernel takes keys, values and bias as constants, it gives only dq. This operation
computes the other gradients from the results of the forward pass. With P = exp(logits - lse), dS = P (dO v - D) and
D = rowsum(dO O), and with sums over the queries t that see key j, in all heads of its group:

    dk_j = scale · sum_t dS_tj q_t        dv_j = sum_t P_tj dO_t        dbias_j = sum_t dS_tj

Z batch (of segments), H query heads, G KV heads, R = H / G group, S queries, K keys, D head dim.
"""

import math

import torch
from torch import Tensor

from dma_kernels.attention.ops import check_machine
from dma_kernels.launching import register_launch


@torch.library.custom_op("dma_kernels::key_gradients", mutates_args=())
def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k and v, in their dtype, and of the bias, `[Z, G, K]` in float32 (float64 if q is).

    Args:
        q: `[Z, H, S, D]`.
        k: `[Z, G, K, D]`, H a multiple of G.
        v: `[Z, G, K, D]`.
        bias: `[Z, G, K]`.
        birth: first query that sees a key, int32 `[Z, G or 1, K]`.
        death: first later query that no longer sees it, same shape.
        lse: log-sum-exp of the logits, in base e, `[Z, H, S]`; -inf for a query without keys.
        delta: rowsum(dO · O), `[Z, H, S]`.
        grad_out: gradient of the attention's output, `[Z, H, S, D]`.
        scale: factor of q·k.
    """
    return key_gradients_reference(q, k, v, bias, birth, death, lse, delta, grad_out, scale)


@register_launch(key_gradients)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_machine(q.device, q.dtype)
    from dma_kernels.attention.kernels.key_gradients import launch_key_gradients

    return launch_key_gradients(q, k, v, bias, birth, death, lse * math.log2(math.e), delta, grad_out, scale=scale)


@key_gradients.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dbias = k.new_empty(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return k.new_empty(k.shape), v.new_empty(v.shape), dbias


def key_gradients_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`key_gradients` in plain PyTorch: it computes all of P and dS at once, in at least float32."""
    dtype, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    q, grad_out, lse, delta = (x.to(dtype).unflatten(1, (kv_heads, -1)) for x in (q, grad_out, lse, delta))
    k_wide, v_wide, bias = (x.to(dtype)[:, :, None] for x in (k, v, bias))  # a group of 1
    query = torch.arange(q.shape[-2], device=q.device)[:, None]
    visible = (birth[:, :, None, None] <= query) & (query < death[:, :, None, None])  # [Z, G or 1, 1, S, K]

    lse = lse.masked_fill(lse == -torch.inf, 0)  # a query without keys, or with all logits at -inf: P is 0, not NaN
    logits = q @ k_wide.mT * scale + bias[..., None, :]  # [Z, G, R, S, K]
    p = torch.where(visible, (logits - lse[..., None]).exp(), 0)
    ds = torch.where(visible, p * (grad_out @ v_wide.mT - delta[..., None]), 0)
    dk, dv = (ds.mT @ q).sum(2) * scale, (p.mT @ grad_out).sum(2)
    return dk.to(k.dtype), dv.to(v.dtype), ds.sum((2, 3))
