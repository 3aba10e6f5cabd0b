"""The tensors of a cache, and the new keys that it takes.

B batch, G KV heads, n new positions, D head dim, C slots, M any number of slots.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from dma_kernels.checks import check_attention_inputs
from dma_kernels.packing import Packing

EMPTY = -1  # position of a slot that holds no key


@dataclass(frozen=True)
class NewKeys:
    """Keys that arrive at a cache, in the order of their positions.

    Attributes:
        key: after the rotary embedding, `[B, G, n, D]`.
        value: same shape.
        key_bias: added to the logits of each key, `[B, G, n]` in float32 or float64.
        rank: the number that selection compares, floating or int64 `[B, G, n]`.
        packing: documents and padding of the n positions; None if there are none, and the document continues.
        query_bias: added to all logits of each query, `[B, G, n]` in float32 or float64; None stands for 0. Softmax
            ignores it. But biases that add up along a text grow large, and become small again if those of the query
            are subtracted: both are added before the sum is rounded to the dtype in which attention computes.
    """

    key: Tensor
    value: Tensor
    key_bias: Tensor
    rank: Tensor
    packing: Packing | None = None
    query_bias: Tensor | None = None

    @property
    def documents(self) -> Tensor | None:
        """Integer ids `[B, n]`; an id that differs from that of the last real position begins a document."""
        return None if self.packing is None else self.packing.documents

    @property
    def padding(self) -> Tensor | None:
        """Bool `[B, n]`, True at padded positions."""
        return None if self.packing is None else self.packing.padding

    @property
    def real(self) -> Tensor:
        """Which positions are not padding, bool `[B, n]`."""
        if self.padding is not None:
            return ~self.padding
        return torch.ones(self.key.shape[0], self.key.shape[2], dtype=torch.bool, device=self.key.device)

    def check(self, q: Tensor) -> None:
        """Raise `ValueError` unless keys and queries `[B, H, n, D]` match and have at least one position."""
        check_attention_inputs(q, self.key, self.value)
        if 0 in self.key.shape:
            raise ValueError(f"k: expected at least one sequence and position, got {list(self.key.shape)}")
        biases = {"key_bias": self.key_bias} | ({} if self.query_bias is None else {"query_bias": self.query_bias})
        for name, x in biases.items():
            self._check_numbers(name, x, "float32 or float64", x.dtype in (torch.float32, torch.float64))
        rank = self.rank
        self._check_numbers("ranks", rank, "floating or int64", rank.is_floating_point() or rank.dtype == torch.int64)
        if self.packing is not None:
            self.packing.check_fits(rank.shape[0], rank)

    def _check_numbers(self, name: str, x: Tensor, kind: str, is_of_kind: bool) -> None:
        """Raise `ValueError` unless `x` has one number for each key, of the right kind."""
        shape, device = self.key.shape[:3], self.key.device
        if x.shape != shape or x.device != device or not is_of_kind:
            raise ValueError(
                f"{name}: expected {kind} {list(shape)} on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
            )


@dataclass
class Slots:
    """Fields of keys, each `[B, G, M, ...]`.

    Attributes:
        key: after the rotary embedding, `[B, G, M, D]`.
        value: same shape.
        key_bias: added to the logits, `[B, G, M]` in at least float32.
        rank: the number that selection compares, same shape; floating or int64.
        position: int64 `[B, G, M]`; -1 in an empty slot.
        ranked: whether a key is among the last r positions, or the w best before them, bool `[B, G, M]`.
        sink: whether a key is among the first of its document, bool `[B, G, M]`.
    """

    key: Tensor
    value: Tensor
    key_bias: Tensor
    rank: Tensor
    position: Tensor
    ranked: Tensor
    sink: Tensor

    @property
    def all(self) -> tuple[Tensor, ...]:
        """The fields above, in their order."""
        return self.key, self.value, self.key_bias, self.rank, self.position, self.ranked, self.sink

    def take(self, index: Tensor, found: Tensor) -> "Slots":
        """The slots with these numbers, `[B, G, K]`; those that are not `found` are empty."""

        def rows(x: Tensor) -> Tensor:
            taken = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
            return taken.masked_fill(~found[..., None], 0)

        position = self.position.gather(2, index).masked_fill(~found, EMPTY)
        flags = ((self.ranked.gather(2, index) & found), (self.sink.gather(2, index) & found))
        key_bias, rank = (x.gather(2, index).masked_fill(~found, 0) for x in (self.key_bias, self.rank))
        return Slots(rows(self.key), rows(self.value), key_bias, rank, position, *flags)

    def joined(self, other: "Slots") -> "Slots":
        """The slots of both, its own first."""
        return Slots(*(torch.cat(pair, dim=2) for pair in zip(self.all, other.all, strict=True)))


@dataclass
class CacheState(Slots):
    """All tensors of a `DynamicMaskCache`, M = C; a step of one position changes them in place.

    Attributes:
        document: id of the last real position, int64 `[B]`.
        lengths: positions read so far, int64 `[B, G]`. Each KV head counts for itself, since a kernel's programs for
            different heads do not wait for each other.
        seen: real positions read so far of the last document, int64 `[B, G]`.
        arrivals: counts the programs that have finished, int32 `[B, G]`; zeros between the calls of a kernel.
    """

    document: Tensor
    lengths: Tensor
    seen: Tensor
    arrivals: Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], head_dim: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> Self:
        """Slots `[B, G, C]` without keys; `dtype` is that of keys and values."""
        wide = torch.promote_types(dtype, torch.float32)
        key, value = (torch.zeros(*shape, head_dim, dtype=dtype, device=device) for _ in range(2))
        key_bias, rank = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))
        position = torch.full(shape, EMPTY, dtype=torch.int64, device=device)
        ranked, sink = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
        document = torch.zeros(shape[0], dtype=torch.int64, device=device)
        lengths, seen = (torch.zeros(shape[:2], dtype=torch.int64, device=device) for _ in range(2))
        arrivals = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        return cls(key, value, key_bias, rank, position, ranked, sink, document, lengths, seen, arrivals)

    def hold(self, **dtypes: torch.dtype) -> None:
        """Give fields these dtypes; a field that had another dtype is filled with zeros."""
        for name, dtype in dtypes.items():
            if (x := getattr(self, name)).dtype != dtype:
                setattr(self, name, torch.zeros_like(x, dtype=dtype))

    def select(self, rows: Tensor) -> "CacheState":
        """These sequences, int64 `[B']`, in this order, as new tensors."""
        return CacheState(*(getattr(self, field.name).index_select(0, rows) for field in fields(self)))

    @property
    def visible(self) -> Tensor:
        """Which slots the last query sees, bool `[B, G, C]`."""
        return self.ranked | self.sink
