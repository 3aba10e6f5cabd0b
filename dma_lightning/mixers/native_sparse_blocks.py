"""Blocks of native sparse attention where documents and padding are given as places.

B batch, H query heads, G KV heads, n queries, N length, Nc compressed blocks, m chosen blocks, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.selected_blocks.choice import choose_blocks, choose_blocks_reference
from dma_kernels.selected_blocks.grid import NO_RUN, BlockSizes, Seen, sees_compressed
from dma_lightning.mixers.position_cache import Places


@dataclass(frozen=True)
class BlockGrid(BlockSizes):
    """Sizes of blocks, and what queries at given places see and choose of them."""

    def sees_compressed(self, queries: Places, keys: Places) -> Tensor:
        """Which compressed blocks queries see, bool `[B, 1, n, Nc]`: those with only real tokens of their document."""
        return sees_compressed(queries.position, queries.run, self._block_run(keys), self)

    @torch.no_grad()
    def choose(self, q: Tensor, compressed_keys: Tensor, first: Tensor, queries: Places, keys: Places) -> Tensor:
        """`choose_blocks_reference` for some queries, int64 `[B, G, n, m]`, in plain PyTorch.

        Args:
            q: `[B, H, n, D]`, rotated.
            compressed_keys: `[B, G, Nc, D]`.
            first: first position of each query's document, int64 `[B, n]`.
            queries: places of the queries.
            keys: places of all keys, from position 0.
        """
        seen = Seen(queries.run, first, self._block_run(keys))
        return choose_blocks_reference(q, compressed_keys, queries.position, seen, keys.position.shape[0], self)

    def choose_at_once(self, q: Tensor, compressed_keys: Tensor, first: Tensor, places: Places) -> Tensor:
        """`choose_blocks` for the queries of a whole sequence, int64 `[B, G, N, m]`; on CUDA by a Triton kernel."""
        dtype = torch.promote_types(q.dtype, compressed_keys.dtype)  # they can differ under autocast
        seen = Seen(places.run, first, self._block_run(places))
        return choose_blocks(q.to(dtype), compressed_keys.to(dtype), seen, self)

    def _block_run(self, keys: Places) -> Tensor:
        """Number of the document of each compressed block, int64 `[B, Nc]`; `NO_RUN` if no query sees the block."""
        start = torch.arange(self.compressed(keys.position.shape[0]), device=keys.run.device) * self.compress_stride
        end = start + self.compress_block - 1
        padded = F.pad(keys.padding.long().cumsum(-1), (1, 0))
        whole = (padded[:, end + 1] == padded[:, start]) & (keys.run[:, start] == keys.run[:, end])
        return torch.where(whole, keys.run[:, start], NO_RUN)
