"""Copies rows into segments, and sums the copies for the gradient.

The rows of `x` [B, G, N, D] are numbered by batch, head and position, `r = (b * G + g) * N + n`. The two plain
functions run on any device. The two custom ops, which are opaque to torch.compile, do the same; on CUDA, each is one
pass of a Triton kernel.

B batch, G KV heads, N length, D head dim, M slots (any shape).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.launching import register_launch


def flat_rows(key: Tensor, length: int) -> Tensor:
    """Row of the key in each slot, `[B, G, ...]` in the dtype of `key`; -1 where `key` is negative."""
    head = torch.arange(key.shape[0] * key.shape[1], dtype=key.dtype, device=key.device) * length
    return torch.where(key < 0, -1, key + head.view(*key.shape[:2], *[1] * (key.ndim - 2)))


def gather_rows_reference(x: Tensor, row: Tensor) -> Tensor:
    """Rows of `x` [B, G, N, D] by number, `[M..., D]`; zeros where the number is -1."""
    rows = x.reshape(-1, x.shape[-1]).index_select(0, row.clamp(min=0).flatten().long())
    # Not in place: inside an autograd function that torch 2.11 compiles, the gradients would be wrong.
    return rows.view(*row.shape, x.shape[-1]).masked_fill((row < 0)[..., None], 0)


def sum_copies_reference(rows: Tensor, row: Tensor, shape: list[int]) -> Tensor:
    """The transpose of `gather_rows`: the sum of each row's copies, in at least float32, `shape` [B, G, N, D]."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).masked_fill((row < 0)[..., None], 0)
    total = torch.zeros(shape, dtype=wide.dtype, device=wide.device)
    total.view(-1, shape[-1]).index_add_(0, row.clamp(min=0).flatten().long(), wide.reshape(-1, shape[-1]))
    return total.to(rows.dtype)


@dataclass(frozen=True)
class Copies:
    """Which row is in which slot, and the reverse: which slots hold each row.

    Attributes:
        row: row in each slot, int32 `[M...]`; -1 in an empty slot.
        first: where in `slot` each row's copies begin, int32 `[B * G * N + 1]`.
        slot: slots, sorted by the row that they hold, int32 `[M]`; -1 after the last copy.
    """

    row: Tensor
    first: Tensor
    slot: Tensor

    @classmethod
    def of(cls, row: Tensor, nth: Tensor, rows: int) -> "Copies":
        """Index the copies of `rows` rows without sorting.

        Args:
            row: int32 `[M...]`, -1 in an empty slot.
            nth: which copy of its row a slot holds, 0, 1, ..., int32, same shape.
            rows: B * G * N.
        """
        flat, used = row.flatten(), row.flatten() >= 0
        # Empty slots add to an extra last row. On a real row, all of these atomic additions would wait for each other.
        count = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
        count = count.index_add(0, torch.where(used, flat, rows), torch.ones_like(flat))[:-1]
        first = F.pad(count.cumsum(0, dtype=torch.int32), (1, 0))
        place = torch.where(used, first[flat.clamp(min=0)] + nth.flatten(), flat.numel())
        number = torch.arange(flat.numel(), dtype=torch.int32, device=row.device)
        slot = torch.full((flat.numel() + 1,), -1, dtype=torch.int32, device=row.device)
        return cls(row, first, slot.scatter(0, place.long(), number)[:-1])

    def gather(self, x: Tensor) -> Tensor:
        """Rows of `x` [B, G, N, D] in their slots, `[M..., D]`; differentiable, deterministic."""
        return gather_rows(x, self.row, self.first, self.slot)

    def gather_plain(self, x: Tensor) -> Tensor:
        """`gather` in plain PyTorch."""
        return gather_rows_plain(x, self.row)


def gather_rows_plain(x: Tensor, row: Tensor) -> Tensor:
    """`gather_rows` in plain PyTorch: on any device, without Triton, and differentiable twice."""
    return _GatherRows.apply(x, row)


class _GatherRows(torch.autograd.Function):
    """Rows of `x` [B, G, N, D]; the backward is one index-add, unsorted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.shape = list(x.shape)
        return gather_rows_reference(x, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row,) = ctx.saved_tensors
        return sum_copies_reference(grad, row, ctx.shape), None


@torch.library.custom_op("dma_kernels::gather_rows", mutates_args=())
def gather_rows(x: Tensor, row: Tensor, first: Tensor, slot: Tensor) -> Tensor:
    """Rows of `x` [B, G, N, D] by number, `[M..., D]`; zeros where the number is -1. See `Copies`."""
    return gather_rows_reference(x, row)


@register_launch(gather_rows)
def _(x: Tensor, row: Tensor, first: Tensor, slot: Tensor) -> Tensor:
    from dma_kernels.segments.gather_kernels import launch_gather_rows

    return launch_gather_rows(x, row)


@torch.library.custom_op("dma_kernels::sum_copies", mutates_args=())
def sum_copies(rows: Tensor, row: Tensor, first: Tensor, slot: Tensor, shape: list[int]) -> Tensor:
    """The sum of each row's copies, `shape` [B, G, N, D] in the dtype of `rows`; added up in at least float32."""
    return sum_copies_reference(rows, row, shape)


@register_launch(sum_copies)
def _(rows: Tensor, row: Tensor, first: Tensor, slot: Tensor, shape: list[int]) -> Tensor:
    from dma_kernels.segments.sum_kernels import launch_sum_copies

    return launch_sum_copies(rows, first, slot, shape=shape)


@gather_rows.register_fake
def _(x: Tensor, row: Tensor, first: Tensor, slot: Tensor) -> Tensor:
    return x.new_empty(*row.shape, x.shape[-1])


@sum_copies.register_fake
def _(rows: Tensor, row: Tensor, first: Tensor, slot: Tensor, shape: list[int]) -> Tensor:
    return rows.new_empty(shape)


def _save_copies(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, *copies = inputs
    ctx.save_for_backward(*copies)
    ctx.shape = list(x.shape)


def _sum_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return sum_copies(grad, *ctx.saved_tensors, ctx.shape), None, None, None


gather_rows.register_autograd(_sum_gradient, setup_context=_save_copies)
