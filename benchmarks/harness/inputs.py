"""Inputs of attention, and baseline attentions. H query heads, G KV heads, N length, D head dim."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from dma_kernels import Lifetimes

# Query heads, KV heads, N, w: ours, and the paper's.
SHAPES = [(16, 4, 32768, 1024), (16, 4, 131072, 2048)]
SHAPES += [(32, 8, length, 1024) for length in (8192, 16384, 32768)]

DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}


def make_inputs(
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int = 128,
    *,
    projected: bool = False,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Random q `[1, H, N, D]`, k and v `[1, G, N, D]`, and ranks `[1, G, N]` in float32, all of which require grad.

    Args:
        heads: H.
        kv_heads: G.
        length: N.
        head_dim: D.
        projected: whether q, k and v lie in memory as projections leave them, `[1, N, H, D]`.
        device: of all tensors.
        dtype: of q, k and v.
    """
    torch.manual_seed(0)
    shapes = [(1, length, h, head_dim) if projected else (1, h, length, head_dim) for h in (heads, kv_heads, kv_heads)]
    qkv = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    if projected:
        qkv = [x.transpose(1, 2) for x in qkv]
    return [x.requires_grad_() for x in (*qkv, torch.randn(1, kv_heads, length, device=device))]


def ranks_by_kind(noise: Tensor) -> dict[str, Tensor]:
    """Ranks of several kinds, made from random ones `[1, G, N]`, contiguous and without a gradient."""
    noise = noise.detach()
    position = torch.linspace(0, 1, noise.shape[-1], device=noise.device)
    decay = 0.99 ** torch.arange(2048, device=noise.device).flip(0)
    autoregressive = F.conv1d(F.pad(noise.transpose(0, 1), (2047, 0)), decay[None, None]).transpose(0, 1)
    kinds = {
        "random": noise,
        "all equal": torch.zeros_like(noise),
        "drift up": noise + 20 * position,
        "drift down": noise - 20 * position,
        "AR(1), 0.99": autoregressive,
        "8 values": (2 * noise).round() / 2,
    }
    return {kind: ranks.contiguous() for kind, ranks in kinds.items()}


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's dense causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dynamic(attend: Callable[..., Tensor], window: int, *inputs: Tensor) -> Tensor:
    """Dynamic mask attention of q, k, v and ranks, selection included. The ranks are also the key biases."""
    return attend(*inputs, Lifetimes.top_w(inputs[3], window))


def step(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Run forward and backward; the gradients of all inputs."""
    return torch.autograd.grad(attend(*inputs), inputs, grad)
