"""A cache for decoding: it holds the past keys and values that a query can still see, and nothing else.

A key that has left the top-w never returns, so a cache of w + r + s slots is exact: it holds the last r positions, the
w best-ranked keys before them, and the first s keys of the document. Its shape does not depend on the number of
positions read. A sink that is no longer among the best stays in the cache as unranked, since it cannot become ranked
again.

B batch, H query heads, G KV heads, n new positions, D head dim, C slots, M = C + n.

Source: the interval of a key, arXiv 2508.02124v6, equation 4: the w-th best score of a prefix never falls.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.attention.ops import check_kernels_can, check_machine
from dma_kernels.attention.torch_backend import segment_attention
from dma_kernels.decoding.attention import Attention, attend_from_last, decode_attention
from dma_kernels.decoding.state import EMPTY, CacheState, NewKeys, Slots
from dma_kernels.decoding.step import decode_step, decode_step_reference
from dma_kernels.keep_rule import HasKeepRule, KeepRule
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.packing import document_ends, document_runs
from dma_kernels.ranks import saturated
from dma_kernels.selection.ops import deaths_by_rank

StepBackend = Literal["torch", "triton"]

FEW = 64  # up to this many positions, one dense product is cheaper
_WIDEST = {"rank": torch.int64, "key_bias": torch.float64}  # dtypes for keys with a drift


class KeyCache(Protocol):
    """The interface of caches that decoder layers use."""

    if TYPE_CHECKING:  # a cache may compute it

        @property
        def length(self) -> Tensor:
            """Positions read so far, int64 `[B]`."""

    else:  # with a property here, a subclass could not assign it
        length: Tensor

    def attend(self, q: Tensor, new: NewKeys, attention: Attention = segment_attention) -> Tensor:
        """Attend from new positions to the cache and each other, and keep their keys. See `DynamicMaskCache`."""

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may occur several times."""


@dataclass
class _Chunk:
    """The keys of the cache, followed by new ones, and their deaths, counted in slots: new key i is number C + i."""

    slots: Slots
    ranked_death: Tensor
    death: Tensor
    real: Tensor
    document: Tensor
    number: Tensor  # number of a new key in its document, from 1


class DynamicMaskCache(HasKeepRule):
    """The exact cache of one layer: `keep_window_size + keep_last + sinks` slots per KV head, for a text of any length.

    It is for inference: nothing that it computes has a gradient. It works on the device, in fixed shapes, and never
    waits for the device. A step of one position changes its tensors in place, as CUDA graphs need. The first keys that
    it keeps decide whether its ranks are floating or int64, and whether its biases are float64.

    Args:
        batch: B.
        num_kv_heads: G.
        head_dim: D.
        keep: which keys a query keeps; a number alone stands for w. Memory for all slots is allocated at once.
        dtype: dtype of keys and values.
        device: where the cache is.
        backend: for steps of one position. `triton` is one kernel; it needs CUDA, and the dtypes and head dims that
            `fused_attention` takes.

    Attributes:
        keep: the keep rule.
        state: all tensors.

    Raises:
        ValueError: if a size is out of range, or the backend is unknown or cannot do what is asked.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        keep: KeepRule | int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: StepBackend = "torch",
    ) -> None:
        if min(batch, num_kv_heads, head_dim) < 1:
            raise ValueError(
                f"expected batch, num_kv_heads and head_dim >= 1, got {batch}, {num_kv_heads} and {head_dim}"
            )
        if backend not in get_args(StepBackend):
            raise ValueError(f"backend: expected one of {list(get_args(StepBackend))}, got {backend!r}")
        self.keep = keep if isinstance(keep, KeepRule) else KeepRule(keep)
        self.state = CacheState.empty((batch, num_kv_heads, self.keep.capacity), head_dim, dtype, device)
        if backend == "triton":
            check_kernels_can(dtype, head_dim)
            check_machine(self.state.key.device, dtype)
        self.backend = backend
        self._started = False  # whether any slot can hold a key, known without waiting for the device
        self._pending: _Chunk | None = None

    def _change(self, **sizes: int) -> None:
        raise ValueError(f"expected the sizes that the cache was made with, {self.keep}, got {sizes}; make a new cache")

    @property
    def capacity(self) -> int:
        """C, the slots per KV head."""
        return self.keep.capacity

    @property
    def length(self) -> Tensor:
        """Positions read so far, padding included, int64 `[B]`."""
        return self.state.lengths[:, 0]

    @property
    def seen(self) -> Tensor:
        """Real positions read so far of the last document, int64 `[B]`."""
        return self.state.seen[:, 0]

    @torch.no_grad()
    def attend(self, q: Tensor, new: NewKeys, attention: Attention = segment_attention) -> Tensor:
        """Attend from n new positions to the cache and each other, and keep what later positions can see.

        One position costs O(C), and a few cost O(n (C + n)). More positions go through `attention`, over C + n keys.
        The result does not depend on how a sequence is divided into calls. Only which queries show a NaN or infinity of
        v can differ.

        Args:
            q: `[B, H, n, D]`, rotated by positions that count from `length`.
            new: the n keys, rotated in the same way.
            attention: the function that attends from more than a few positions.

        Returns:
            `[B, H, n, D]`.

        Raises:
            ValueError: if shapes, dtypes or devices do not match.
        """
        self._check(q, new)
        self._pending = None
        if q.shape[2] == 1 and self._started:
            return self._step(q, new)
        out = self.verify(q, new, attention)
        self.commit(torch.full_like(self.length, q.shape[2]))
        return out

    @torch.no_grad()
    def verify(self, q: Tensor, new: NewKeys, attention: Attention = segment_attention) -> Tensor:
        """Return what `attend` returns, but keep nothing until `commit` says how many positions were right.

        Until then, the tensors of the new keys must not change.
        """
        self._check(q, new)
        self._pending = None
        chunk = self._extended(new)
        slots, keys = chunk.slots, chunk.death.shape[-1]
        past = keys - q.shape[2]
        birth = torch.arange(keys, dtype=torch.int32, device=q.device)
        if self._started and q.shape[2] <= FEW:
            query = birth[past:, None]
            visible = (birth <= query) & (query < chunk.death[..., None, :])  # [B, G, n, M]
            out = decode_attention(q, slots.key, slots.value, slots.key_bias, visible, new.query_bias)
            self._pending = chunk
            return out
        lifetimes = Lifetimes(
            birth.expand_as(chunk.death), chunk.death.int(), min(self.capacity, keys), born_at_position=True
        )
        out = attend_from_last(attention, q, (slots.key, slots.value, slots.key_bias), lifetimes, new.query_bias)
        self._pending = chunk
        return out

    @torch.no_grad()
    def commit(self, count: Tensor) -> None:
        """Keep the first `count` positions, int64 `[B]`, of the last call of `verify`. A count of 0 changes nothing.

        A count below 0 becomes 0, and a count above n becomes n.

        Raises:
            ValueError: if there is no call of `verify` to commit, or `count` is not such a tensor.
        """
        chunk = self._pending
        if chunk is None:
            raise ValueError("commit: expected a call of verify before it, got none")
        if not isinstance(count, Tensor) or count.shape != self.length.shape or count.dtype != torch.int64:
            raise ValueError(f"count: expected an int64 tensor {list(self.length.shape)}, got {count}")
        self._pending = None
        count = count.clamp(0, chunk.real.shape[-1])
        keys = chunk.death.shape[-1]
        past = keys - chunk.real.shape[-1]
        index = torch.arange(keys, device=count.device)
        last = (past + count - 1)[:, None, None]  # the last query to keep; the cache then holds what it sees
        alive = (index <= last) & (last < chunk.death)
        numbered = F.pad(torch.where(alive, index + 1, 0), (max(0, self.capacity - keys), 0))
        taken = numbered.topk(self.capacity, dim=-1).values.flip(-1)
        kept = chunk.slots.take((taken - 1).clamp(min=0), taken > 0)
        ranked_death = chunk.ranked_death.gather(2, (taken - 1).clamp(min=0))
        kept.ranked = (taken > 0) & (last < ranked_death)
        changed = count > 0
        self.state.hold(rank=kept.rank.dtype, key_bias=kept.key_bias.dtype)
        for old, x in zip(self.state.all, kept.all, strict=True):
            old.copy_(torch.where(changed.view(-1, *[1] * (x.ndim - 1)), x, old))

        place = torch.arange(1, chunk.real.shape[-1] + 1, device=count.device)
        latest = torch.where(chunk.real & (place <= count[:, None]), place, 0).amax(-1)  # last real position, from 1
        at = (latest - 1).clamp(min=0)[:, None]
        document, number = (x.gather(1, at) for x in (chunk.document, chunk.number))
        self.state.document.copy_(torch.where(latest > 0, document.squeeze(1), self.state.document))
        self.state.seen.copy_(torch.where((latest > 0)[:, None], number, self.state.seen))
        self.state.lengths += count[:, None]
        self._started = True

    def guessing(self) -> KeyCache:
        """A cache for a layer that reads guessed tokens: its `attend` is `verify` of this cache. Call `commit` here."""
        return _Guessing(self)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, int64 `[B']`, in this order; a row may occur several times, as in beam search.

        This makes new tensors, which a CUDA graph that was captured before does not use.
        """
        self.state = self.state.select(rows)
        self._pending = None

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, and the sizes w, r and s. They are not copies: the next step changes them."""
        slots = {name: getattr(self.state, name) for name in Slots.__dataclass_fields__}
        sizes = torch.tensor([self.keep.window, self.keep.last, self.keep.sinks])
        rest = {"document": self.state.document, "length": self.length, "seen": self.seen, "sizes": sizes}
        return slots | rest

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of another cache of the same shape; ranks and biases get the dtypes of that cache.

        Raises:
            ValueError: if names, shapes, dtypes or sizes differ; then nothing is copied.
        """
        state = {"key_bias" if name == "score" else name: x for name, x in state.items()}  # "score" is the old name
        own = self.state_dict()
        expected, found = (
            {name: x.tolist() if name == "sizes" else (list(x.shape), x.dtype) for name, x in y.items()}
            for y in (own, state)
        )
        kinds = {name: x.dtype for name, x in state.items() if x.dtype == _WIDEST.get(name)}
        kinds |= dict.fromkeys(_WIDEST.keys() - kinds.keys(), self._wide)
        expected |= {name: (found[name][0], dtype) for name, dtype in kinds.items() if name in found}
        if expected != found:
            raise ValueError(f"expected the state of a cache with {expected}, got {found}")
        self.state.hold(**kinds)
        for name in Slots.__dataclass_fields__:
            getattr(self.state, name).copy_(state[name])
        self.state.document.copy_(state["document"])
        self.state.lengths.copy_(state["length"][:, None])
        self.state.seen.copy_(state["seen"][:, None])
        # Earlier versions did not count all of the last positions as ranked.
        recent = self.state.position > (self.length - 1 - self.keep.last)[:, None, None]
        self.state.ranked |= recent & (self.state.position != EMPTY)
        self._started, self._pending = True, None

    def visible(self) -> Tensor:
        """Which slots the last position sees, bool `[B, G, C]`."""
        return self.state.visible

    def _check(self, q: Tensor, new: NewKeys) -> None:
        """Raise `ValueError` unless new keys fit the cache."""
        new.check(q)
        k, own = new.key, self.state
        batch, kv_heads, _, head_dim = own.key.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (batch, kv_heads, head_dim) or k.device != own.key.device:
            raise ValueError(
                f"k: expected [{batch}, {kv_heads}, n, {head_dim}] on {own.key.device} for this cache, "
                f"got {list(k.shape)} on {k.device}"
            )
        if k.dtype != own.key.dtype:
            raise ValueError(f"k: expected {own.key.dtype} as the cache, got {k.dtype}; make the cache in that dtype")
        (rank, bias), held = self._dtypes(new), (own.rank.dtype, own.key_bias.dtype)
        if self._started and (rank != held[0] or bias.itemsize > held[1].itemsize):
            raise ValueError(
                f"ranks and key_bias: expected {held[0]} and {held[1]} as those of the keys in the cache, got "
                f"{new.rank.dtype} and {new.key_bias.dtype}; read the text again with an empty cache (also if "
                "this cache was saved by an older version, in which ranks with a drift were floating numbers)"
            )

    def _dtypes(self, new: NewKeys) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes in which the ranks and biases of new keys are kept."""
        rank = torch.int64 if new.rank.dtype == torch.int64 else self._wide
        return rank, torch.promote_types(new.key_bias.dtype, self._wide)

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of floating ranks, and of biases that are not wider."""
        return torch.promote_types(self.state.key.dtype, torch.float32)

    def _extended(self, new: NewKeys) -> _Chunk:
        """The keys of the cache followed by the new keys, in an order from which the selection can continue."""
        state, real, (batch, _, count, _) = self.state, new.real, new.key.shape
        runs = None if new.documents is None else self._runs(new.documents, real)  # [B, n], 0 for that of the cache
        number = _number_in_document(real, runs, self.seen)
        slots = self._arrived(new, real, number)
        if self._started:
            slots = self._sorted_slots().joined(slots)
        keys = slots.position.shape[-1]
        past = keys - count
        padding, runs = (None if x is None else F.pad(x, (past, 0)) for x in (new.padding, runs))
        filled = (slots.position != EMPTY) & F.pad(real, (past, 0), value=True)[:, None]

        birth = torch.arange(keys, device=real.device)
        end: int | Tensor = keys if runs is None else document_ends(runs)
        # Unranked keys are in front and have the lowest rank, so the selection ignores them.
        lowest = -torch.inf if slots.rank.is_floating_point() else torch.iinfo(torch.int64).min
        top = deaths_by_rank(slots.rank.masked_fill(~slots.ranked, lowest), runs, padding, self.keep.window)
        if self.keep.last:  # a key dies this many positions after the arrival of the key that pushes it out
            late = slots.position.gather(2, top.clamp(max=keys - 1).long()) + self.keep.last
            top = torch.where(top < keys, late + (past - self.length)[:, None, None], keys)
        ranked_death = torch.where(slots.ranked & filled, top.clamp(max=end), birth)
        death = torch.where(slots.sink & filled, end, ranked_death)
        documents = new.documents
        document = state.document[:, None].expand(batch, count) if documents is None else documents.clone()
        return _Chunk(slots, ranked_death, death, real, document, number)

    def _arrived(self, new: NewKeys, real: Tensor, number: Tensor) -> Slots:
        """New keys as slots; `number` is their number in their document, from 1."""
        position = self.length[:, None] + torch.arange(real.shape[-1], device=real.device)
        flags = (x[:, None].expand_as(new.rank) for x in (position, real, real & (number <= self.keep.sinks)))
        rank, bias = self._dtypes(new)
        if self._started:  # the cache may hold wider biases
            bias = self.state.key_bias.dtype
        return Slots(new.key, new.value, saturated(new.key_bias).to(bias), new.rank.to(rank), *flags)

    def _runs(self, documents: Tensor, real: Tensor) -> Tensor:
        """Number of the document of each new position, `[B, n]`; 0 is the document that the cache is in."""
        documents = torch.cat([self.state.document[:, None], documents.long()], dim=1)
        padding = torch.cat([(self.seen == 0)[:, None], ~real], dim=1)
        return document_runs(documents, padding)[:, 1:].contiguous()

    def _sorted_slots(self) -> Slots:
        """The slots of the cache, unranked ones first, then by position."""
        order = (self.state.position + (self.state.ranked.long() << 62)).argsort(dim=-1)
        return self.state.take(order, self.state.position.gather(2, order) != EMPTY)

    def _step(self, q: Tensor, new: NewKeys) -> Tensor:
        """`attend` of one position, in place."""
        if new.documents is not None:
            self._start_documents(new.documents[:, 0].long(), new.real[:, 0])
        step = decode_step_reference if self.backend == "torch" else decode_step
        return step(q, new, self.state, self.keep)

    def _start_documents(self, documents: Tensor, real: Tensor) -> None:
        """Drop the keys of sequences in which a new document starts; `documents` has the ids `[B]` of one position."""
        state = self.state
        start = (documents != state.document) & real
        state.position.masked_fill_(start[:, None, None], EMPTY)
        state.ranked.masked_fill_(start[:, None, None], False)
        state.sink.masked_fill_(start[:, None, None], False)
        state.value.masked_fill_(start[:, None, None, None], 0)  # a NaN would pass through a weight of 0
        state.seen.masked_fill_(start[:, None], 0)
        state.document.copy_(torch.where(start, documents, state.document))


class _Guessing:
    """A view of a cache that attends but keeps nothing."""

    def __init__(self, cache: DynamicMaskCache) -> None:
        self.attend, self.select, self._cache = cache.verify, cache.select, cache

    @property
    def length(self) -> Tensor:
        return self._cache.length


def _number_in_document(real: Tensor, runs: Tensor | None, seen: Tensor) -> Tensor:
    """Number of each new position among the real ones of its document, `[B, n]`; run 0 has `seen` earlier ones."""
    count = real.long().cumsum(-1)
    if runs is None:
        return count + seen[:, None]
    start = torch.searchsorted(runs, runs)
    before = (count - real.long()).gather(-1, start)
    return count - before + torch.where(runs == 0, seen[:, None], 0)
