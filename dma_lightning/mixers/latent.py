"""Multi-head latent attention: keys and values of all heads from one small vector per token.

B batch, N length, C hidden size, H heads, L latent rank, R rotated dim, P plain dim, V value dim.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dma_kernels import Lifetimes, Packing
from dma_lightning.mixers.base import (
    MixerConfig,
    TokenMixer,
    check_even,
    check_mixer_input,
    mean_keys,
    merge_heads,
    normalized,
    positions_of,
)
from dma_lightning.mixers.position_cache import PositionCache
from dma_lightning.mixers.sdpa import SDPA_OR_FLEX, attend_places, lifetime_attention
from dma_lightning.rotary import apply_rope


@dataclass(frozen=True, kw_only=True)
class LatentConfig(MixerConfig):
    """The settings that latent attention reads."""

    kv_lora_rank: int = 32
    """mla: width of the latent vector of a token."""
    qk_rope_head_dim: int = 16
    """mla: channels of a query and key that are rotated, an even number."""
    qk_nope_head_dim: int = 16
    """mla: channels of a query and key that are not rotated."""
    v_head_dim: int = 32
    """mla: channels of a value."""


class LatentAttention(TokenMixer[PositionCache]):
    """Causal self-attention whose keys and values are made from a latent vector and one rotated key for all heads.

    It trains in the expanded form, with keys and values for every head. It decodes in the absorbed form, in which the
    latent vectors themselves serve as keys and values: the cache holds only them and the rotated keys. Both forms give
    the same results, up to rounding.

    Args:
        hidden_size: C, width of input and output.
        num_heads: H.
        kv_lora_rank: L, width of the latent vector.
        qk_rope_head_dim: R, channels of a query and key that are rotated; even.
        qk_nope_head_dim: P, channels that are not rotated.
        v_head_dim: V, channels of a value.
        rope_theta: base of the rotary embedding.
        rope_scaling: positions are divided by it before the rotary embedding.
        rms_norm_eps: epsilon of the RMSNorm on the latent vector.
        bias: whether the projections have a bias.

    Raises:
        ValueError: if a size is out of range.

    Source: arXiv 2405.04434, section 2.1, without a latent vector for queries. Parameter names as in the DeepSeek-V3
        model of Hugging Face Transformers, but the rotation pairs the two halves of the channels, not neighbors.
    """

    read_weights = ("kv_b_proj",)  # decoding reads it

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int = 64,
        qk_nope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope_theta: float = 10_000.0,
        rope_scaling: float = 1.0,
        rms_norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if min(num_heads, kv_lora_rank, qk_nope_head_dim, v_head_dim) < 1:
            raise ValueError(
                "expected num_heads, kv_lora_rank, qk_nope_head_dim and v_head_dim >= 1, "
                f"got {num_heads}, {kv_lora_rank}, {qk_nope_head_dim} and {v_head_dim}"
            )
        check_even("qk_rope_head_dim", qk_rope_head_dim)
        self.num_heads, self.kv_lora_rank, self.v_head_dim = num_heads, kv_lora_rank, v_head_dim
        self.qk_rope_head_dim, self.qk_nope_head_dim = qk_rope_head_dim, qk_nope_head_dim
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5

        self.q_proj = nn.Linear(hidden_size, num_heads * (qk_nope_head_dim + qk_rope_head_dim), bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=rms_norm_eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)

    @classmethod
    def from_config(cls, config: LatentConfig) -> Self:
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            config.qk_nope_head_dim,
            config.v_head_dim,
            config.rope_theta,
            config.rope_scaling,
            config.rms_norm_eps,
            config.attention_bias,
        )

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: PositionCache | None = None,
    ) -> Tensor:
        check_mixer_input(x, self.q_proj.weight)
        positions = positions_of(x, cache)
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, P + R]
        q_plain, q_rotated = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_rotated = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = normalized(latent, self.kv_a_layernorm)  # [B, N, L]
        q_rotated = apply_rope(q_rotated, self.rope_theta, positions, self.rope_scaling)
        k_rotated = apply_rope(k_rotated[:, None], self.rope_theta, positions, self.rope_scaling)  # [B, 1, N, R]
        if cache is None:
            out = self._expanded(q_plain, q_rotated, latent, k_rotated, packing)
        else:
            fresh, key = not cache.count, torch.cat([latent[:, None], k_rotated], dim=-1)  # [B, 1, N, L + R]
            kept, keys, queries = cache.extend(packing, key=key)
            if fresh:
                out = self._expanded(q_plain, q_rotated, latent, k_rotated, packing)
            else:
                up_keys, up_values = self._up()
                q_latent = torch.einsum("bhnp,hpl->bhnl", q_plain, up_keys)
                q, key = torch.cat([q_latent, q_rotated], dim=-1), kept["key"]
                mixed = attend_places(q, key, key[..., : self.kv_lora_rank], queries, keys, scale=self.scale)
                out = torch.einsum("bhnl,hvl->bhnv", mixed, up_values)
        return self.o_proj(merge_heads(out))

    def new_cache(self, batch: int, full: bool = False) -> PositionCache:
        return PositionCache(batch, device=self.q_proj.weight.device)

    def computed_by(self, device: torch.device, dtype: torch.dtype) -> str:
        return SDPA_OR_FLEX

    def mixing_flops(self, length: int) -> float:
        """FLOPs of the expanded form."""
        channels = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return 2 * self.num_heads * channels * mean_keys(length)

    def cache_elements(self, length: int) -> int:
        return length * (self.kv_lora_rank + self.qk_rope_head_dim)

    def _expanded(
        self,
        q_plain: Tensor,
        q_rotated: Tensor,
        latent: Tensor,
        k_rotated: Tensor,
        packing: Packing | None,
    ) -> Tensor:
        """Attention with keys and values for every head, `[B, H, N, V]`."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_plain, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        q = torch.cat([q_plain, q_rotated], dim=-1)
        k = torch.cat([k_plain, k_rotated.expand(-1, self.num_heads, -1, -1)], dim=-1)
        if packing is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        mask = Lifetimes.causal(q.shape[2], q.device, packing=packing)
        return lifetime_attention(q, k, v, mask, self.scale)

    def _up(self) -> tuple[Tensor, ...]:
        """The matrices that make plain keys `[H, P, L]` and values `[H, V, L]` from a latent vector."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        return weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
