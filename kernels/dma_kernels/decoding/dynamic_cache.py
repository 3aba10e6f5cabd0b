"""Keys and values of the past for decoding: all that a query can still see, and nothing else.

A key that is out of the top-w never returns, so a cache of w + r + s slots is exact: the w ranked keys, the last r
positions and the first s keys of the document. Its shape does not depend on how much has been read. A key that is kept
only because it is recent is remembered as unranked, since it has lost its place for good.

B batch, H query heads, G KV heads, n new positions, D head dim, C slots, M = C + n.

Source: the interval of a key, arXiv 2508.02124v6, equation 4: the w-th best score of a prefix never falls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.attention.ops import check_kernels_can, check_machine
from dma_kernels.attention.plain import segment_attention
from dma_kernels.checks import check_attention_inputs
from dma_kernels.decoding.attention import decode_attention
from dma_kernels.decoding.step import decode_step
from dma_kernels.lifetimes import Lifetimes, check_documents, document_ends, document_runs
from dma_kernels.scores import ordered_bits, saturated
from dma_kernels.selection.ops import deaths_by_rank

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Lifetimes], Tensor]  # of q, k, v, scores
StepBackend = Literal["torch", "triton"]

_EMPTY = -1  # position of a slot that holds no key
FEW = 64  # up to so many positions are cheaper as rows of one dense product


class KeyCache(Protocol):
    """What a decoder layer asks of a cache."""

    length: Tensor
    """Positions read so far, int64 `[B]`."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor,
        ranks: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        attention: Attention = segment_attention,
    ) -> Tensor:
        """Attend from new positions to the cache and themselves, and keep their keys. See `DynamicMaskCache`."""

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may be named several times."""


@dataclass
class _Slots:
    """Fields of keys, each `[B, G, M, ...]`."""

    key: Tensor
    value: Tensor
    score: Tensor
    rank: Tensor
    position: Tensor
    ranked: Tensor
    sink: Tensor

    def take(self, index: Tensor, found: Tensor) -> "_Slots":
        """Slots by number, `[B, G, K]`; those not `found` are empty."""

        def rows(x: Tensor) -> Tensor:
            taken = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
            return taken.masked_fill(~found[..., None], 0)

        position = self.position.gather(2, index).masked_fill(~found, _EMPTY)
        flags = ((self.ranked.gather(2, index) & found), (self.sink.gather(2, index) & found))
        numbers = (x.gather(2, index).masked_fill(~found, 0) for x in (self.score, self.rank))
        return _Slots(rows(self.key), rows(self.value), *numbers, position, *flags)

    def joined(self, other: "_Slots") -> "_Slots":
        """The slots of both, these first."""
        return _Slots(*(torch.cat(pair, dim=2) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class _Chunk:
    """New keys behind those of the cache, and until when each lives, counted in slots: new key i is number C + i."""

    slots: _Slots
    ranked_death: Tensor
    death: Tensor
    real: Tensor
    document: Tensor
    number: Tensor  # of a new key in its document, from 1


class DynamicMaskCache:
    """The exact cache of one layer: `keep_window_size + keep_last + sinks` slots per KV head, whatever has been read.

    For inference: nothing that it computes has a gradient. All is on the device, in fixed shapes, without waiting for
    it; a step of one position changes its tensors in place, as CUDA graphs need it.

    Args:
        batch: B.
        num_kv_heads: G.
        head_dim: D.
        keep_window_size: w, keys that a query keeps; memory for so many is taken at once.
        keep_last: r, positions that stay visible besides.
        sinks: s, first keys of each document that stay visible besides.
        dtype: of keys and values.
        device: where the cache is.
        backend: of steps of one position: `triton` is one kernel, for CUDA and what `fused_attention` takes.

    Attributes:
        key: after the rotary embedding, `[B, G, C, D]`.
        value: same shape.
        score: bias of the logits, `[B, G, C]` in at least float32.
        rank: what selection compares, same shape.
        position: int64 `[B, G, C]`; -1 in an empty slot.
        ranked: whether a key is among the w best so far, bool `[B, G, C]`.
        sink: whether a key is among the first of its document, bool `[B, G, C]`.
        document: id of the last real position, int64 `[B]`.

    Raises:
        ValueError: if a size is out of range, or the backend is unknown or cannot do what is asked.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        keep_window_size: int,
        keep_last: int = 0,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: StepBackend = "torch",
    ) -> None:
        if min(batch, num_kv_heads, head_dim, keep_window_size) < 1 or min(keep_last, sinks) < 0:
            raise ValueError(
                "expected batch, num_kv_heads, head_dim and keep_window_size >= 1, keep_last and sinks >= 0, "
                f"got {batch}, {num_kv_heads}, {head_dim}, {keep_window_size}, {keep_last} and {sinks}"
            )
        if backend not in get_args(StepBackend):
            raise ValueError(f"backend: expected one of {list(get_args(StepBackend))}, got {backend!r}")
        self.keep_window_size, self.keep_last, self.sinks = keep_window_size, keep_last, sinks
        shape = (batch, num_kv_heads, keep_window_size + keep_last + sinks)
        wide = torch.promote_types(dtype, torch.float32)
        self.key, self.value = (torch.zeros(*shape, head_dim, dtype=dtype, device=device) for _ in range(2))
        self.score, self.rank = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))
        self.position = torch.full(shape, _EMPTY, dtype=torch.int64, device=device)
        self.ranked, self.sink = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
        self.document = torch.zeros(batch, dtype=torch.int64, device=device)
        # Each KV head counts for itself, since the programs of a kernel that serve different ones do not wait.
        self._lengths, self._seen = (torch.zeros(shape[:2], dtype=torch.int64, device=device) for _ in range(2))
        if backend == "triton":
            check_kernels_can(dtype, head_dim)
            check_machine(self.key.device, dtype)
        self.backend = backend
        self._arrivals = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self._started = False  # whether any slot can hold a key; known without looking at the device
        self._pending: _Chunk | None = None

    @property
    def capacity(self) -> int:
        """C, the slots per KV head."""
        return self.position.shape[-1]

    @property
    def length(self) -> Tensor:
        """Positions read so far, padding included, int64 `[B]`."""
        return self._lengths[:, 0]

    @property
    def seen(self) -> Tensor:
        """Real positions of the last document so far, int64 `[B]`."""
        return self._seen[:, 0]

    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor,
        ranks: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        attention: Attention = segment_attention,
    ) -> Tensor:
        """Attend from n new positions to the cache and themselves, and keep what later ones can see.

        One position costs O(C), a few O(n (C + n)), more go through `attention` over C + n keys. The result does not
        depend on how a sequence is cut into calls, but for which queries show a NaN or infinity of v.

        Args:
            q: `[B, H, n, D]`, rotated by positions from `length` on.
            k: `[B, G, n, D]`, rotated likewise.
            v: `[B, G, n, D]`.
            scores: `[B, G, n]`.
            ranks: `[B, G, n]`.
            documents: integer document ids `[B, n]`; an id other than the last real position's starts a document. By
                default the document goes on.
            padding: bool `[B, n]`, True at padded positions, whose keys nobody sees.
            attention: how to attend from several positions.

        Returns:
            `[B, H, n, D]`.

        Raises:
            ValueError: if shapes, dtypes or devices do not belong together.
        """
        self._check(q, k, v, scores, ranks, documents, padding)
        self._pending = None
        if k.shape[2] == 1 and self._started:
            return self._step(q, k, v, scores, ranks, documents, padding)
        out = self.verify(q, k, v, scores, ranks, documents, padding, attention)
        self.commit(torch.full_like(self.length, k.shape[2]))
        return out

    @torch.no_grad()
    def verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor,
        ranks: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        attention: Attention = segment_attention,
    ) -> Tensor:
        """What `attend` returns, without keeping anything until `commit` says how many positions were right.

        Until then, k, v, scores and ranks must stay as they are.
        """
        self._check(q, k, v, scores, ranks, documents, padding)
        self._pending = None
        chunk = self._extended(k, v, scores, ranks, documents, padding)
        slots, keys = chunk.slots, chunk.death.shape[-1]
        past = keys - k.shape[2]
        birth = torch.arange(keys, dtype=torch.int32, device=k.device)
        if self._started and k.shape[2] <= FEW:
            query = birth[past:, None]
            visible = (birth <= query) & (query < chunk.death[..., None, :])  # [B, G, n, M]
            out = decode_attention(q, slots.key, slots.value, slots.score, visible)
            self._pending = chunk
            return out
        lifetimes = Lifetimes(
            birth.expand_as(chunk.death), chunk.death.int(), min(self.capacity, keys), born_at_position=True
        )
        q = F.pad(q, (0, 0, past, 0))  # nobody asks from the slots of the cache
        out = attention(q, slots.key, slots.value, slots.score, lifetimes)[:, :, past:]
        self._pending = chunk
        return out

    @torch.no_grad()
    def commit(self, count: Tensor) -> None:
        """Keep the first `count` positions, int64 `[B]`, of what `verify` has seen last; of 0 nothing is changed.

        A number below 0 counts as 0, and one above n as n.

        Raises:
            ValueError: if `verify` was not called last, or `count` is something else.
        """
        chunk = self._pending
        if chunk is None:
            raise ValueError("commit: expected a call of verify before, got none")
        if not isinstance(count, Tensor) or count.shape != self.length.shape or count.dtype != torch.int64:
            raise ValueError(f"count: expected an int64 tensor {list(self.length.shape)}, got {count}")
        self._pending = None
        count = count.clamp(0, chunk.real.shape[-1])
        keys = chunk.death.shape[-1]
        past = keys - chunk.real.shape[-1]
        index = torch.arange(keys, device=count.device)
        last = (past + count - 1)[:, None, None]  # the query after which to keep what it sees
        alive = (index <= last) & (last < chunk.death)
        numbered = F.pad(torch.where(alive, index + 1, 0), (max(0, self.capacity - keys), 0))
        taken = numbered.topk(self.capacity, dim=-1).values.flip(-1)
        kept = chunk.slots.take((taken - 1).clamp(min=0), taken > 0)
        ranked_death = chunk.ranked_death.gather(2, (taken - 1).clamp(min=0))
        kept.ranked = (taken > 0) & (last < ranked_death)
        changed = count > 0
        for name, x in vars(kept).items():
            old = getattr(self, name)
            old.copy_(torch.where(changed.view(-1, *[1] * (x.ndim - 1)), x, old))

        place = torch.arange(1, chunk.real.shape[-1] + 1, device=count.device)
        latest = torch.where(chunk.real & (place <= count[:, None]), place, 0).amax(-1)  # the last real one, from 1
        at = (latest - 1).clamp(min=0)[:, None]
        document, number = (x.gather(1, at) for x in (chunk.document, chunk.number))
        self.document.copy_(torch.where(latest > 0, document.squeeze(1), self.document))
        self._seen.copy_(torch.where((latest > 0)[:, None], number, self._seen))
        self._lengths += count[:, None]
        self._started = True

    def guessing(self) -> KeyCache:
        """What to give a layer that reads guessed tokens: its `attend` is `verify` of this cache; `commit` is here."""
        return _Guessing(self)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, int64 `[B']`, in this order; a row may be named several times, as in beam search.

        The tensors are new ones, which a CUDA graph captured before does not know.
        """
        for name in (*_Slots.__dataclass_fields__, "document", "_lengths", "_seen", "_arrivals"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self._pending = None

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, and the sizes w, r and s; no copies: the next step changes them."""
        names = (*_Slots.__dataclass_fields__, "document", "length", "seen")
        sizes = torch.tensor([self.keep_window_size, self.keep_last, self.sinks])
        return {**{name: getattr(self, name) for name in names}, "sizes": sizes}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of another cache of the same shape.

        Raises:
            ValueError: if names, shapes, dtypes or sizes differ; nothing is copied then.
        """
        expected, found = (
            {name: x.tolist() if name == "sizes" else (list(x.shape), x.dtype) for name, x in y.items()}
            for y in (self.state_dict(), state)
        )
        if expected != found:
            raise ValueError(f"expected the state of a cache with {expected}, got {found}")
        for name in (*_Slots.__dataclass_fields__, "document"):
            getattr(self, name).copy_(state[name])
        self._lengths.copy_(state["length"][:, None])
        self._seen.copy_(state["seen"][:, None])
        self._started, self._pending = True, None

    def visible(self) -> Tensor:
        """Which slots the last position sees, bool `[B, G, C]`."""
        return self._visible(self.length - 1)

    def _visible(self, position: Tensor) -> Tensor:
        """Which slots a query at these positions `[B]` sees."""
        recent = self.position > (position - self.keep_last)[:, None, None]
        return (self.position != _EMPTY) & (self.ranked | self.sink | recent)

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor,
        ranks: Tensor,
        documents: Tensor | None,
        padding: Tensor | None,
    ) -> None:
        """Raise `ValueError` unless new keys fit the cache."""
        check_new_keys(q, k, v, scores, ranks, documents, padding)
        batch, kv_heads, _, head_dim = self.key.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (batch, kv_heads, head_dim) or k.device != self.key.device:
            raise ValueError(
                f"k: expected [{batch}, {kv_heads}, n, {head_dim}] on {self.key.device} for this cache, "
                f"got {list(k.shape)} on {k.device}"
            )
        if k.dtype != self.key.dtype:
            raise ValueError(f"k: expected {self.key.dtype} as the cache, got {k.dtype}; make the cache in that dtype")

    def _extended(
        self, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, documents: Tensor | None, padding: Tensor | None
    ) -> _Chunk:
        """The keys of the cache and new ones behind them, in an order in which a selection can go on."""
        batch, kv_heads, new = k.shape[:3]
        real = torch.ones(batch, new, dtype=torch.bool, device=k.device) if padding is None else ~padding
        runs = None if documents is None else self._runs(documents, real)  # [B, n], 0 the document of the cache
        number = _number_in_document(real, runs, self.seen)
        position = self.length[:, None] + torch.arange(new, device=k.device)

        def by_head(x: Tensor) -> Tensor:
            return x[:, None].expand(batch, kv_heads, new)

        slots = _Slots(
            k, v, saturated(scores).to(self.score.dtype), ranks.to(self.rank.dtype), by_head(position), by_head(real),
            by_head(real & (number <= self.sinks)),
        )  # fmt: skip
        if self._started:
            slots = self._sorted_slots().joined(slots)
        keys = slots.position.shape[-1]
        past = keys - new
        if runs is not None:
            runs = F.pad(runs, (past, 0))
        if padding is not None:
            padding = F.pad(padding, (past, 0))
        filled = (slots.position != _EMPTY) & F.pad(real, (past, 0), value=True)[:, None]

        birth = torch.arange(keys, device=k.device)
        end = keys if runs is None else document_ends(runs)
        # Unranked keys stand in front with the lowest rank, and so count for nothing.
        top = deaths_by_rank(slots.rank.masked_fill(~slots.ranked, -torch.inf), runs, padding, self.keep_window_size)
        ranked_death = torch.where(
            slots.ranked & filled, top.clamp(max=end) if runs is None else top.minimum(end), birth
        )
        recent = slots.position + (past - self.length + self.keep_last)[:, None, None]
        death = torch.where(slots.sink, keys, torch.maximum(ranked_death, recent))
        death = death.clamp(max=keys) if runs is None else torch.minimum(death, end)
        death = torch.where(filled, death, birth)
        document = self.document[:, None].expand(batch, new) if documents is None else documents.clone()
        return _Chunk(slots, ranked_death, death, real, document, number)

    def _runs(self, documents: Tensor, real: Tensor) -> Tensor:
        """Number of the document of each new position, `[B, n]`; 0 goes on with that of the cache."""
        documents = torch.cat([self.document[:, None], documents.long()], dim=1)
        padding = torch.cat([(self.seen == 0)[:, None], ~real], dim=1)
        return document_runs(documents, padding)[:, 1:].contiguous()

    def _sorted_slots(self) -> _Slots:
        """The slots of the cache, unranked ones first, then by position."""
        fields = _Slots(*(getattr(self, name) for name in _Slots.__dataclass_fields__))
        order = (self.position + (self.ranked.long() << 62)).argsort(dim=-1)
        return fields.take(order, self.position.gather(2, order) != _EMPTY)

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor,
        ranks: Tensor,
        documents: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """`attend` of one position, in place."""
        real = None if padding is None else ~padding[:, 0]
        if documents is not None:
            self._start_documents(documents[:, 0].long(), real)
        if self.backend == "torch":
            return self._plain_step(q, k, v, scores, ranks, torch.ones_like(self.seen).bool() if real is None else real)
        slots = (getattr(self, name) for name in _Slots.__dataclass_fields__)
        window, keep_last, sinks = self.keep_window_size, self.keep_last, self.sinks
        return decode_step(
            q, k, v, scores, ranks, real, *slots, self._lengths, self._seen, self._arrivals, window, keep_last, sinks
        )

    def _start_documents(self, documents: Tensor, real: Tensor | None) -> None:
        """Forget the keys of sequences in which a document starts; ids `[B]` of one position."""
        start = documents != self.document
        if real is not None:
            start = start & real
        self.position.masked_fill_(start[:, None, None], _EMPTY)
        self.ranked.masked_fill_(start[:, None, None], False)
        self.sink.masked_fill_(start[:, None, None], False)
        self.value.masked_fill_(start[:, None, None, None], 0)  # a weight of 0 would not stop a NaN
        self._seen.masked_fill_(start[:, None], 0)
        self.document.copy_(torch.where(start, documents, self.document))

    def _plain_step(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, real: Tensor) -> Tensor:
        """`_step` within a document."""
        now = self.length
        self._seen += real[:, None]
        sink = (real & (self.seen <= self.sinks))[:, None]  # [B, 1]

        # The later of two equal ranks wins, so a new key beats its equal.
        order = ordered_bits(self.rank).long() * (1 << 32) + self.position
        lowest, place = order.masked_fill(~self.ranked, torch.iinfo(torch.int64).max).min(dim=-1)  # [B, G]
        full = self.ranked.sum(-1) >= self.keep_window_size
        wins = real[:, None] & (~full | (ordered_bits(ranks[..., 0]).long() * (1 << 32) + now[:, None] > lowest))
        self.ranked.scatter_(2, place[..., None], (self.ranked.gather(2, place[..., None]) & ~(full & wins)[..., None]))

        free = (~self._visible(now)).int().argmax(-1)[..., None]  # [B, G, 1]
        kept = wins | sink | (real & (self.keep_last > 0))[:, None]
        rows = free[..., None].expand(-1, -1, -1, k.shape[-1])
        written = {
            "key": (rows, k), "value": (rows, v), "score": (free, saturated(scores)), "rank": (free, ranks),
            "position": (free, now[:, None, None].expand_as(free)), "ranked": (free, wins[..., None]),
            "sink": (free, sink[..., None].expand_as(free)),
        }  # fmt: skip
        for name, (at, x) in written.items():
            field = getattr(self, name)
            keep = kept.view(*kept.shape, *[1] * (x.ndim - 2))
            field.scatter_(2, at, torch.where(keep, x.to(field.dtype), field.gather(2, at)))
        out = decode_attention(q, self.key, self.value, self.score, self._visible(now))
        self._lengths += 1
        return out


class _Guessing:
    """A cache that keeps nothing of what it attends from."""

    def __init__(self, cache: DynamicMaskCache) -> None:
        self.attend, self.select, self._cache = cache.verify, cache.select, cache

    @property
    def length(self) -> Tensor:
        return self._cache.length


def check_new_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    ranks: Tensor,
    documents: Tensor | None,
    padding: Tensor | None,
) -> None:
    """Raise `ValueError` unless what arrives at a cache belongs together and has at least one position."""
    check_attention_inputs(q, k, v, scores)
    if 0 in k.shape:
        raise ValueError(f"k: expected at least one sequence and position, got {list(k.shape)}")
    if ranks.shape != scores.shape or ranks.device != k.device or not ranks.is_floating_point():
        raise ValueError(
            f"ranks: expected floating {list(scores.shape)} on {k.device}, "
            f"got {ranks.dtype} {list(ranks.shape)} on {ranks.device}"
        )
    check_documents(documents, padding, k.shape[0], ranks)


def _number_in_document(real: Tensor, runs: Tensor | None, seen: Tensor) -> Tensor:
    """How many real positions of its document there are up to each new one, `[B, n]`; `seen` of run 0 came before."""
    count = real.long().cumsum(-1)
    if runs is None:
        return count + seen[:, None]
    start = torch.searchsorted(runs, runs)
    before = (count - real.long()).gather(-1, start)
    return count - before + torch.where(runs == 0, seen[:, None], 0)
