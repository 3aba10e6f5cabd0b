"""Blocks of native sparse attention: which compressed blocks a query sees, and which blocks it selects.

Blocks lie on one grid over the sequence. Compressed block i has the tokens i s … i s + l - 1, and selection block j has
the tokens j b … (j + 1) b - 1.

B batch, H query heads, G KV heads, R = H / G group, n queries, M keys, Nc compressed blocks, Nb selection blocks, m
chosen blocks, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.precision import without_autocast
from dma_kernels.ranks import ordered_bits
from dma_lightning.mixers.position_cache import Places

_FORCED = 0x7FFFFFFF  # above every importance, NaN included
_NO_BLOCK = -1


@dataclass(frozen=True)
class BlockGrid:
    """Sizes of blocks, in tokens.

    Attributes:
        compress_block: l, tokens of a compressed block.
        compress_stride: s, tokens from one compressed block to the next.
        select_block: b, tokens of a selection block.
        select_count: number of blocks that a query chooses, including the forced ones (the first, its own and the one
            before). If it is below 3, only the latest of these are chosen.

    Raises:
        ValueError: if a size is below 1, or a block size is not a multiple of the stride.
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
        """Number of whole compressed blocks in `length` tokens."""
        return max(0, (length - self.compress_block) // self.compress_stride + 1)

    def importance(self, weights: Tensor, keys: int) -> Tensor:
        """Importance of each selection block, from weights of compressed blocks `[..., Nc]`.

        It is the sum of the weights, each times the number of strides that the two blocks share.

        Returns:
            `[..., Nb]`, for all selection blocks of `keys` tokens.
        """
        before, step = self.compress_block // self.compress_stride - 1, self.select_block // self.compress_stride
        offset = torch.arange(-before, step, device=weights.device)  # from the first compressed block that starts in it
        shared = torch.minimum(offset + before + 1, torch.full_like(offset, step)) - offset.clamp(min=0)
        blocks = -(-keys // self.select_block)
        missing = (blocks - 1) * step + len(offset) - before - weights.shape[-1]
        near = F.pad(weights, (before, max(0, missing))).unfold(-1, len(offset), step)[..., :blocks, :]
        return (near * shared).sum(-1)

    def sees_compressed(self, queries: Places, keys: Places) -> Tensor:
        """Which compressed blocks queries see, bool `[B, 1, n, Nc]`: those with only real tokens of their document."""
        start = torch.arange(self.compressed(keys.position.shape[0]), device=keys.run.device) * self.compress_stride
        end = start + self.compress_block - 1
        padded = F.pad(keys.padding.long().cumsum(-1), (1, 0))
        whole = (padded[:, end + 1] == padded[:, start]) & (keys.run[:, start] == keys.run[:, end])  # [B, Nc]
        seen = (end <= queries.position[:, None]) & (keys.run[:, start][:, None] == queries.run[:, :, None])
        return (seen & whole[:, None])[:, None]

    @torch.no_grad()
    def choose(self, q: Tensor, compressed_keys: Tensor, first: Tensor, queries: Places, keys: Places) -> Tensor:
        """The blocks of each query, int64 `[B, G, n, m]`, m at most `select_count`; -1 where there are fewer.

        The importance of a block is the attention, summed over the heads of a group, to the compressed blocks that
        overlap it. It is compared with 16 mantissa bits, and of equal blocks the later is chosen. All heads of a group
        choose the same blocks.

        Args:
            q: `[B, H, n, D]`, rotated.
            compressed_keys: `[B, G, Nc, D]`.
            first: first position of each query's document, int64 `[B, n]`.
            queries: places of the queries.
            keys: places of all keys, from position 0.
        """
        weights = _group_weights(q, compressed_keys, self.sees_compressed(queries, keys))
        importance = self.importance(weights, keys.position.shape[0])  # [B, G, n, Nb]
        block = torch.arange(importance.shape[-1], device=q.device)
        own = (queries.position // self.select_block)[:, None]
        first = (first // self.select_block)[:, :, None]
        candidate = (block <= own) & (block >= first)
        forced = candidate & ((block == first) | (block >= own - 1))
        order = (torch.where(forced[:, None], _FORCED, ordered_bits(importance)).long() << 32) + block
        order = order.masked_fill(~candidate[:, None], _NO_BLOCK)
        chosen = order.topk(min(self.select_count, len(block)), dim=-1)
        return chosen.indices.masked_fill(chosen.values < 0, _NO_BLOCK)


def _group_weights(q: Tensor, compressed_keys: Tensor, visible: Tensor) -> Tensor:
    """Attention to compressed keys, summed over the heads of a group, float `[B, G, n, Nc]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    by_group = q.unflatten(1, (compressed_keys.shape[1], -1)).to(wide)  # [B, G, R, n, D]
    with without_autocast(q.device):
        logits = by_group @ compressed_keys[:, :, None].transpose(-1, -2).to(wide) * q.shape[-1] ** -0.5
    visible = visible[:, :, None]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0).sum(2).float()
