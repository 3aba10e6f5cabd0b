"""Blocks of native sparse attention: which a query sees compressed, and which it chooses to attend to.

Blocks lie on one grid over the sequence. A compressed block i has the tokens i s … i s + l - 1, a selection block j the
tokens j b … (j + 1) b - 1.

B batch, H query heads, G KV heads, R = H / G group, n queries, M keys, Nc compressed blocks, Nb selection blocks, m
chosen blocks, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.precision import without_autocast
from dma_kernels.scores import ordered_bits
from dma_lightning.mixers.position_cache import Places

_FORCED = 0x7FFFFFFF << 32  # above every importance, NaN included
_NO_BLOCK = -1


@dataclass(frozen=True)
class BlockGrid:
    """Sizes of blocks, in tokens.

    Attributes:
        compress_block: l, tokens of a compressed block.
        compress_stride: s, from one compressed block to the next.
        select_block: b, tokens of a selection block.
        select_count: blocks that a query chooses, the forced ones (first, own and the one before) included.

    Raises:
        ValueError: if a size is below 1, or the stride divides not both kinds of blocks.
    """

    compress_block: int
    compress_stride: int
    select_block: int
    select_count: int

    def __post_init__(self) -> None:
        if min(self.compress_block, self.compress_stride, self.select_block, self.select_count) < 1:
            raise ValueError(f"expected block sizes and counts of at least 1, got {self}")
        if self.compress_block % self.compress_stride or self.select_block % self.compress_stride:
            raise ValueError(
                "expected nsa_compress_block and nsa_select_block to be multiples of nsa_compress_stride, got "
                f"{self.compress_block}, {self.select_block} and {self.compress_stride}"
            )

    def compressed(self, length: int) -> int:
        """Compressed blocks that are whole after so many tokens."""
        return max(0, (length - self.compress_block) // self.compress_stride + 1)

    def overlaps(self, keys: int, device: torch.device) -> Tensor:
        """Tokens that compressed and selection blocks share, in strides, float32 `[Nc, Nb]`."""
        start = torch.arange(self.compressed(keys), device=device)[:, None] * self.compress_stride
        first = torch.arange(-(-keys // self.select_block), device=device) * self.select_block
        end = torch.minimum(start + self.compress_block, first + self.select_block)
        return (end - torch.maximum(start, first)).clamp(min=0).float() / self.compress_stride

    def sees_compressed(self, queries: Places, keys: Places) -> Tensor:
        """Which compressed blocks queries see, bool `[B, 1, n, Nc]`: whole ones of real tokens of their document."""
        start = torch.arange(self.compressed(keys.position.shape[0]), device=keys.run.device) * self.compress_stride
        end = start + self.compress_block - 1
        padded = F.pad(keys.padding.long().cumsum(-1), (1, 0))
        whole = (padded[:, end + 1] == padded[:, start]) & (keys.run[:, start] == keys.run[:, end])  # [B, Nc]
        seen = (end <= queries.position[:, None]) & (keys.run[:, start][:, None] == queries.run[:, :, None])
        return (seen & whole[:, None])[:, None]

    @torch.no_grad()
    def choose(self, q: Tensor, compressed_keys: Tensor, queries: Places, keys: Places) -> Tensor:
        """The blocks of each query, int64 `[B, G, n, m]`, m at most `select_count`; -1 where there are fewer.

        The importance of a block is what the group's heads together give to the compressed blocks that overlap it, and
        is compared with 16 mantissa bits; of equal ones the later is chosen. All heads of a group choose the same.

        Args:
            q: `[B, H, n, D]`, rotated.
            compressed_keys: `[B, G, Nc, D]`.
            queries: where the queries stand.
            keys: where all keys stand, from position 0 on.
        """
        with without_autocast(q.device):
            weights = _group_weights(q, compressed_keys, self.sees_compressed(queries, keys))
            importance = weights @ self.overlaps(keys.position.shape[0], q.device)  # [B, G, n, Nb]
        block = torch.arange(importance.shape[-1], device=q.device)
        own = (queries.position // self.select_block)[:, None]
        first = (torch.searchsorted(keys.run, queries.run) // self.select_block)[
            :, :, None
        ]  # of the document, [B, n, 1]
        candidate = (block <= own) & (block >= first)
        forced = candidate & ((block == first) | (block >= own - 1))
        order = (ordered_bits(importance).long() << 32) + block
        order = torch.where(forced[:, None], _FORCED + block, order).masked_fill(~candidate[:, None], _NO_BLOCK)
        chosen = order.topk(min(self.select_count, len(block)), dim=-1)
        return chosen.indices.masked_fill(chosen.values < 0, _NO_BLOCK)


def _group_weights(q: Tensor, compressed_keys: Tensor, visible: Tensor) -> Tensor:
    """Attention to compressed keys, summed over the heads of a group, float `[B, G, n, Nc]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    by_group = q.unflatten(1, (compressed_keys.shape[1], -1)).to(wide)  # [B, G, R, n, D]
    logits = by_group @ compressed_keys[:, :, None].transpose(-1, -2).to(wide) * q.shape[-1] ** -0.5
    visible = visible[:, :, None]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0).sum(2).float()
