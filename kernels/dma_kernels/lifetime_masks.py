"""Causal masks as one interval of queries per key: `visible(t, j)  <=>  birth_j <= t < death_j`.

B batch, G KV heads, N length.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dma_kernels.drawing import draw_mask, mask_png
from dma_kernels.fixed_point import ranks_of_steps
from dma_kernels.keep_rule import KeepRule, check_at_least
from dma_kernels.launching import call
from dma_kernels.packing import Packing, document_ends
from dma_kernels.selection.ops import deaths_by_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Lifetimes:
    """Every key lives in one interval of queries; a causal mask is two integers per key.

    Masks combine as `a | b` (a query sees the keys of either mask) and `a & b` (only the keys that are in both).
    Documents and padding do not combine this way. They are arguments of the constructors: if a finished selection were
    cut at the border of a document, queries could be left without keys, because keys of another document had already
    pushed out their own.

    Attributes:
        birth: first query that sees the key, its own position, int32 `[B or 1, G or 1, N]`.
        death: first later query that no longer sees it, same shape. If `death <= birth`, no query sees the key.
        capacity: an upper bound on the number of keys that are alive at once.
        born_at_position: whether `birth` is known to be each key's own position. It is in every constructor below.

    Raises:
        ValueError: if the tensors are not int32 of one shape `[B or 1, G or 1, N]`, or the capacity is below 1.
    """

    birth: Tensor
    death: Tensor
    capacity: int
    born_at_position: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, x in (("birth", self.birth), ("death", self.death)):
            if x.ndim != 3 or x.dtype != torch.int32:
                raise ValueError(f"{name}: expected int32 [B or 1, G or 1, N], got {x.dtype} {list(x.shape)}")
        if self.birth.shape != self.death.shape or self.birth.device != self.death.device:
            raise ValueError(
                "birth and death must have one shape and device, got "
                f"{list(self.birth.shape)} on {self.birth.device} and {list(self.death.shape)} on {self.death.device}"
            )
        if self.capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {self.capacity}")

    def __repr__(self) -> str:
        batch, heads, length = self.death.shape
        return (
            f"Lifetimes(batch={batch}, heads={heads}, length={length}, capacity={self.capacity}, {self.death.device})"
        )

    def _repr_png_(self) -> bytes | None:
        """The mask of the first sequence and head, for notebooks; None without Matplotlib."""
        return mask_png(self.birth[0, 0], self.death[0, 0])

    @property
    def length(self) -> int:
        """N, the number of positions."""
        return self.death.shape[-1]

    @classmethod
    def causal(
        cls,
        length: int,
        device: torch.device | str | None = None,
        *,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        packing: Packing | None = None,
    ) -> "Lifetimes":
        """Every query sees its whole past, within its document. Arguments as in `sliding_window`."""
        return cls.sliding_window(length, length, device, documents=documents, padding=padding, packing=packing)

    @classmethod
    def sliding_window(
        cls,
        length: int,
        window: int,
        device: torch.device | str | None = None,
        *,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        packing: Packing | None = None,
    ) -> "Lifetimes":
        """Query t sees the keys `t - window < j <= t`: `window` positions, its own included.

        Args:
            length: N.
            window: how many positions a query sees.
            device: where to build the mask; by default where `documents` or `padding` are.
            documents: integer document ids `[B, N]`, as in `top_w`.
            padding: bool `[B, N]`, True at padded positions, as in `top_w`; they count as positions of the window.
            packing: documents and padding together, if they are packed already.

        Raises:
            ValueError: on wrong shapes, dtypes or devices, or sizes below 1.
        """
        check_at_least("window", window, 1)
        birth, packing = _positions(length, device, documents, padding, packing)
        death = (birth + min(window, length)).clamp(max=length)
        return cls._within(birth, death, min(window, length), packing)

    @classmethod
    def last(
        cls,
        length: int,
        count: int,
        device: torch.device | str | None = None,
        *,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> "Lifetimes":
        """The last `count` positions, for a union with another mask; the same as `sliding_window`."""
        check_at_least("count", count, 1)
        return cls.sliding_window(length, count, device, documents=documents, padding=padding)

    @classmethod
    def sinks(
        cls,
        length: int,
        count: int,
        device: torch.device | str | None = None,
        *,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> "Lifetimes":
        """The first `count` real keys of each document, visible to its end. Other arguments as in `sliding_window`."""
        check_at_least("count", count, 1)
        birth, packing = _positions(length, device, documents, padding)
        death = torch.where(is_sink(count, birth, packing), length, birth)
        return cls._within(birth, death, min(count, length), packing)

    @classmethod
    def top_w(
        cls,
        ranks: Tensor,
        keep_window_size: int,
        *,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        keep_last: int = 0,
        sinks: int = 0,
        drift: Tensor | None = None,
    ) -> "Lifetimes":
        """The dynamic mask: each query sees the `keep_window_size` best-ranked keys of its own past.

        With `keep_last`, each query sees its last positions and the best-ranked keys before them. Documents and
        padding take part in the selection itself, so a key of another document never pushes out a key of this one.

        Args:
            ranks: `[B, G, N]`. Of two equal ranks, the later key wins. Floating-point ranks are compared in float32
                with 16 mantissa bits, and int64 ranks as integers.
            keep_window_size: W, how many keys a query keeps; if it is more than N, all of them.
            documents: integer document ids `[B, N]`. A document is a run of equal ids; ids at padded positions
                are ignored. Queries see only keys of their own document.
            padding: bool `[B, N]`, True at padded positions, which can be anywhere. No query sees these keys, and the
                selection ignores them.
            keep_last: this many last positions are visible whatever their rank. A key competes with others only once
                it is no longer among them.
            sinks: this many first real keys of each document stay visible to its end.
            drift: how far each position lets all keys before it fall behind, in nats, floating `[B, G, N]`, at least 0.
                The rank of a key is then its entry in `ranks`, in nats, plus the sum of the drift up to its position,
                without padded positions. Both are integers in units of 2^-32 nats (`dma_kernels.fixed_point`). By
                default there is no drift.

        Raises:
            ValueError: on wrong shapes, dtypes or devices, or numbers out of range.
        """
        check_ranks(ranks)
        packing = Packing.of(documents, padding, batch=ranks.shape[0], like=ranks)
        if drift is not None:
            ranks = ranks_of_steps(ranks, drift, padding)
        return cls.selected(ranks, KeepRule(keep_window_size, keep_last, sinks), packing)

    @classmethod
    def selected(cls, ranks: Tensor, keep: KeepRule, packing: Packing | None = None) -> "Lifetimes":
        """`top_w` for an existing keep rule and packing.

        Raises:
            ValueError: if ranks or packing have another shape, dtype or device.
        """
        check_ranks(ranks)
        length, packing = ranks.shape[-1], packing or Packing()
        packing.check_fits(ranks.shape[0], ranks)
        birth = torch.arange(length, dtype=torch.int32, device=ranks.device)[None, None]
        # With last positions, the competition is the same, this many positions later.
        death = call(deaths_by_rank, ranks.detach(), packing.runs, packing.padding, keep.window, keep.last)
        if keep.sinks:
            death = torch.where(is_sink(keep.sinks, birth, packing), length, death)
        return cls._within(birth, death, min(keep.capacity, length), packing)

    @classmethod
    def _within(cls, birth: Tensor, death: Tensor, capacity: int, packing: Packing) -> "Lifetimes":
        """Lifetimes from each key's position to `death`, or to its document's end if earlier; empty for padding."""
        if packing.runs is not None:
            death = torch.minimum(death, document_ends(packing.runs))
        if packing.padding is not None:
            death = torch.where(packing.padding[:, None], birth, death)
        return cls(birth.expand_as(death), death, capacity, born_at_position=True)

    def __and__(self, other: "Lifetimes") -> "Lifetimes":
        """The keys that are visible in both masks.

        Raises:
            ValueError: if the masks differ in length or device, or in a batch or head size that is not 1.
        """
        birth, death, other_birth, other_death = self._broadcast(other)
        return Lifetimes(
            torch.maximum(birth, other_birth),
            torch.minimum(death, other_death),
            min(self.capacity, other.capacity),
            born_at_position=self.born_at_position and other.born_at_position,
        )

    def __or__(self, other: "Lifetimes") -> "Lifetimes":
        """The keys that are visible in either mask.

        The union of masks from the constructors always has one interval per key. For other masks, the values are
        checked, which waits for the device.

        Raises:
            ValueError: as for `&`, and if a key would get two intervals.
        """
        birth, death, other_birth, other_death = self._broadcast(other)
        born_at_position = self.born_at_position and other.born_at_position
        if not born_at_position:
            lives, other_lives = death > birth, other_death > other_birth
            apart = lives & other_lives & ((death < other_birth) | (other_death < birth))
            if apart.any():
                first = tuple(apart.nonzero()[0].tolist())
                ends = [x[first].item() for x in (birth, death, other_birth, other_death)]
                raise ValueError(
                    f"the union leaves key {first} (batch, head, position) with two intervals, [{ends[0]}, {ends[1]}) "
                    f"and [{ends[2]}, {ends[3]}); a mask can hold only one interval of queries per key"
                )
            birth, death = torch.where(lives, birth, other_birth), torch.where(lives, death, other_death)
            other_birth, other_death = (
                torch.where(other_lives, other_birth, birth),
                torch.where(other_lives, other_death, death),
            )
        return Lifetimes(
            torch.minimum(birth, other_birth),
            torch.maximum(death, other_death),
            min(self.capacity + other.capacity, self.length),
            born_at_position=born_at_position,
        )

    def _broadcast(self, other: "Lifetimes") -> tuple[Tensor, ...]:
        """Birth and death of both masks in one shape."""
        pairs = list(zip(self.death.shape, other.death.shape, strict=True))
        fits = all(1 in pair or pair[0] == pair[1] for pair in pairs[:2]) and self.length == other.length
        if not fits or self.death.device != other.death.device:
            raise ValueError(
                "masks must agree in length and device, and in batch and heads unless one of them has 1, got "
                f"{list(self.death.shape)} on {self.death.device} and {list(other.death.shape)} on {other.death.device}"
            )
        return torch.broadcast_tensors(self.birth, self.death, other.birth, other.death)

    def check_segmentable(self) -> None:
        """Raise `ValueError` unless the mask can be cut into segments; for masks made by hand, reads their values."""
        if self.born_at_position:
            return
        position = torch.arange(self.length, device=self.birth.device)
        if (self.birth != position).any():
            raise ValueError(
                "expected every key to be born at its own position, birth[..., j] == j; masks with other births can be "
                "drawn and turned into block masks, but not cut into segments; use `block_mask` for them"
            )
        if (self.live_counts() > self.capacity).any():
            raise ValueError(
                f"capacity: expected at least {self.live_counts().max()}, the number of keys alive at once, "
                f"got {self.capacity}"
            )

    def to_dense(self) -> Tensor:
        """The mask itself, bool `[B or 1, G or 1, N, N]` (query, key); for small N."""
        query = torch.arange(self.length, device=self.death.device)[:, None]
        return (self.birth[..., None, :] <= query) & (query < self.death[..., None, :])

    def live_counts(self) -> Tensor:
        """How many keys each query sees, int64 `[B or 1, G or 1, N]`, in O(N)."""
        lives = (self.death > self.birth).long()
        change = torch.zeros(*self.death.shape[:-1], self.length + 1, dtype=torch.long, device=self.death.device)
        change.scatter_add_(-1, self.birth.long().clamp(0, self.length), lives)
        change.scatter_add_(-1, self.death.long().clamp(0, self.length), -lives)
        return change.cumsum(-1)[..., :-1]

    def density(self) -> Tensor:
        """Share of the causal pairs (query, key) that is visible, float `[B or 1, G or 1]`, in O(N); causal is 1."""
        return self.live_counts().sum(-1) / (self.length * (self.length + 1) / 2)

    def draw(self, batch: int = 0, head: int = 0, block_size: int = 16, axes: "Axes | None" = None) -> "Figure":
        """A Matplotlib figure of one head's mask, with its blocks marked as empty, partial or full. See `draw_mask`."""
        return draw_mask(self.to_dense()[batch, head], block_size, axes)


def _positions(
    length: int,
    device: torch.device | str | None,
    documents: Tensor | None,
    padding: Tensor | None,
    packing: Packing | None = None,
) -> tuple[Tensor, Packing]:
    """Birth of every key, int32 `[1, 1, N]`, and the packing; checks the arguments."""
    check_at_least("length", length, 1)
    if packing is not None and not (documents is None and padding is None):
        raise ValueError("expected either documents and padding or a packing, got both; a packing contains them")
    pair = (documents, padding) if packing is None else (packing.documents, packing.padding)
    given = [x for x in pair if x is not None]
    if device is None and given:
        device = given[0].device
    birth = torch.arange(length, dtype=torch.int32, device=device)
    batch = given[0].shape[0] if given and given[0].ndim else 1
    if packing is None:
        packing = Packing.of(documents, padding, batch=batch, like=birth) or Packing()
    packing.check_fits(batch, birth)
    return birth[None, None], packing


def is_sink(sinks: int, birth: Tensor, packing: Packing) -> Tensor:
    """Which keys are among the first `sinks` real ones of their document, bool `[B or 1, 1, N]`."""
    padding, runs = packing.padding, packing.runs
    real = torch.ones_like(birth[0], dtype=torch.long) if padding is None else (~padding).long()
    seen = real.cumsum(-1)  # [B or 1, N], this position included
    if runs is not None:
        first = torch.searchsorted(runs, runs)
        seen = seen - (seen - real).expand_as(runs).gather(-1, first)
    return (seen <= sinks)[:, None]


def check_ranks(ranks: Tensor) -> None:
    """Raise `ValueError` unless ranks are those of a sequence."""
    if ranks.ndim != 3 or not (ranks.is_floating_point() or ranks.dtype == torch.int64):
        raise ValueError(f"ranks: expected floating or int64 [B, G, N], got {ranks.dtype} {list(ranks.shape)}")
    check_at_least("sequence length", ranks.shape[-1], 1)
