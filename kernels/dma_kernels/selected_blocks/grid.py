"""Blocks of native sparse attention: their sizes, which compressed blocks a query sees, and what a block is worth.

Blocks lie on one grid over the sequence. Compressed block i has the tokens i s … i s + l - 1, and selection block j has
the tokens j b … (j + 1) b - 1.

B batch, n queries, Nc compressed blocks, Nb selection blocks, m chosen blocks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORCED = 0x7FFFFFFF  # above every importance, NaN included
NO_BLOCK = -1
NO_RUN = -2  # the run of a compressed block that no query sees


@dataclass(frozen=True)
class BlockSizes:
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

    @property
    def before(self) -> int:
        """Number of compressed blocks that share tokens with a selection block and begin before it."""
        return self.compress_block // self.compress_stride - 1

    @property
    def step(self) -> int:
        """Number of compressed blocks that begin in a selection block."""
        return self.select_block // self.compress_stride

    def compressed(self, length: int) -> int:
        """Number of whole compressed blocks in `length` tokens."""
        return max(0, (length - self.compress_block) // self.compress_stride + 1)

    def chosen(self, length: int) -> int:
        """m, the maximum number of blocks that a query chooses among those of `length` tokens."""
        return min(self.select_count, -(-length // self.select_block))

    def importance(self, weights: Tensor, keys: int) -> Tensor:
        """Importance of each selection block, from weights of compressed blocks `[..., Nc]`.

        It is the sum of the weights, each times the number of strides that the two blocks share.

        Returns:
            `[..., Nb]`, for all selection blocks of `keys` tokens.
        """
        before, step = self.before, self.step
        offset = torch.arange(-before, step, device=weights.device)  # from the first compressed block that starts in it
        shared = torch.minimum(offset + before + 1, torch.full_like(offset, step)) - offset.clamp(min=0)
        blocks = -(-keys // self.select_block)
        missing = (blocks - 1) * step + len(offset) - before - weights.shape[-1]
        near = F.pad(weights, (before, max(0, missing))).unfold(-1, len(offset), step)[..., :blocks, :]
        return (near * shared).sum(-1)


class Seen(NamedTuple):
    """What queries see: only compressed blocks and selection blocks of their own document.

    Attributes:
        run: number of each query's document, integers `[B, n]`; -1 for padding before the first document.
        first: first position of each query's document, integers `[B, n]`.
        block_run: number of the document in which each compressed block lies, integers `[B, Nc]`; `NO_RUN` if it has
            padding or crosses a border.
    """

    run: Tensor
    first: Tensor
    block_run: Tensor

    def queries(self, start: int, end: int) -> "Seen":
        """What the queries from index `start` up to, not including, `end` see."""
        return Seen(self.run[:, start:end], self.first[:, start:end], self.block_run)


def sees_compressed(position: Tensor, run: Tensor, block_run: Tensor, sizes: BlockSizes) -> Tensor:
    """Which compressed blocks queries see, bool `[B, 1, n, Nc]`: those before them, in their document.

    Args:
        position: position of each query, int64 `[n]`.
        run: as in `Seen`, `[B, n]`.
        block_run: as in `Seen`, `[B, Nc]`.
        sizes: sizes of the blocks.
    """
    start = torch.arange(block_run.shape[-1], device=position.device) * sizes.compress_stride
    past = start + sizes.compress_block - 1 <= position[:, None]  # [n, Nc]
    return (past & (block_run[:, None] == run[:, :, None]))[:, None]
