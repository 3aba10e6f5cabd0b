"""Tensors of past positions for decoding: of all positions, or of the last few in a ring.

B batch, n new positions, M positions that are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dma_kernels.packing import Packing, document_runs


@dataclass(frozen=True)
class Places:
    """Position, document and padding of keys or queries.

    Attributes:
        position: int64 `[M]`.
        run: number of the document in its row, int64 `[B, M]`; -1 for padding before the first document.
        padding: bool `[B, M]`, True at padded positions.
    """

    position: Tensor
    run: Tensor
    padding: Tensor

    def rows(self, start: int, end: int) -> "Places":
        """The places from index `start` up to, not including, `end`."""
        return Places(self.position[start:end], self.run[:, start:end], self.padding[:, start:end])

    def first_of(self, keys: "Places") -> Tensor:
        """First position of each query's document, int64 `[B, n]`; `keys` are all positions up to the last query."""
        none = torch.full((keys.run.shape[0], keys.run.shape[1] + 1), keys.run.shape[1], device=keys.run.device)
        first = none.scatter_reduce(1, keys.run + 1, keys.position.expand_as(keys.run), "amin")
        return first.gather(1, self.run + 1)  # runs count from -1

    def sees(self, keys: "Places", window: int | None = None) -> Tensor:
        """Which keys queries at these places see, bool `[B, 1, n, M]`."""
        distance = self.position[:, None] - keys.position
        near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return (near & (self.run[:, :, None] == keys.run[:, None]) & ~keys.padding[:, None])[:, None]


class PositionCache:
    """Named tensors of every position, or of the last `window` positions in a ring. For inference.

    All sequences have read the same number of positions, padding included.

    Args:
        batch: B.
        window: how many positions to keep. By default all are kept, in memory that doubles whenever it is full.
        device: where the cache is.

    Attributes:
        count: positions read so far.
    """

    def __init__(self, batch: int, window: int | None = None, device: torch.device | str | None = None) -> None:
        if batch < 0 or (window is not None and window < 1):
            raise ValueError(f"expected batch >= 0 and window >= 1 or None, got {batch} and {window}")
        self.batch, self.window, self.count = batch, window, 0
        self._kept: dict[str, Tensor] = {}  # [B, ..., memory, D] each
        self._position = torch.zeros(0, dtype=torch.int64, device=device)
        self.device = self._position.device
        self._run, self._padding = (torch.zeros(batch, 0, dtype=x, device=device) for x in (torch.int64, torch.bool))
        # Of the last real position: the id of its document, and the document's number.
        self._document, self._last_run = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self._started = torch.zeros(batch, dtype=torch.bool, device=device)

    @property
    def length(self) -> Tensor:
        """Positions read so far, int64 `[B]`."""
        return torch.full((self.batch,), self.count, device=self.device)

    def place(self, new: int, packing: Packing | None) -> Places:
        """Places of the next `new` positions; a document that continues keeps its number.

        Raises:
            ValueError: if documents or padding are not `[B, new]` on the cache's device.
        """
        position = torch.arange(self.count, self.count + new, device=self.device)
        if packing is not None:
            packing.check_fits(self.batch, position)
        if packing is None or (packing.documents is None and packing.padding is None):  # the document continues
            none = torch.zeros(self.batch, new, dtype=torch.bool, device=self.device)
            return Places(position, self._last_run[:, None].expand(-1, new), none)
        documents, padding = packing.documents, packing.padding
        padding = torch.zeros(self.batch, new, dtype=torch.bool, device=self.device) if padding is None else padding
        documents = self._document[:, None].expand(-1, new) if documents is None else documents.long()
        before = torch.cat([self._document[:, None], documents], dim=1)
        runs = document_runs(before, torch.cat([~self._started[:, None], padding], dim=1))[:, 1:]
        begun = self._started[:, None] | ((~padding).cumsum(1) > 0)  # padding before the first document has none
        return Places(position, torch.where(begun, self._last_run[:, None] + runs, -1), padding)

    @torch.no_grad()
    def extend(self, packing: Packing | None, **new: Tensor) -> tuple[dict[str, Tensor], Places, Places]:
        """Keep new positions.

        Args:
            packing: documents and padding of the new positions.
            new: tensors `[B, ..., n, D]`.

        Returns:
            The tensors of all kept positions, new ones included; their places; and the places of the new positions.

        Raises:
            ValueError: if documents or padding do not fit, or tensors do not match those that are kept.
        """
        self._check(new)
        size = next(iter(new.values())).shape[-2]
        places = self.place(size, packing)
        if self.window is not None and size == 1 and self._position.shape[0] == self.window:  # overwrite the oldest
            self._write(places, new, self.count % self.window)
            kept, all_places = self._kept, Places(self._position, self._run, self._padding)
        elif self.window is None:
            self._grow(self.count + size, places, new)
            self._write(places, new, self.count)
            end = self.count + size
            kept = {name: x[..., :end, :] for name, x in self._kept.items()}
            all_places = Places(self._position[:end], self._run[:, :end], self._padding[:, :end])
        else:
            kept, all_places = self._joined(places, new)
            self._keep_last(kept, all_places, self.count + size, self.window)
        if packing is not None and packing.documents is not None:
            order = torch.arange(1, size + 1, device=self.device)
            last = torch.where(places.padding, 0, order).amax(-1)  # last real position, counted from 1
            at = (last - 1).clamp(min=0)[:, None]
            self._document = torch.where(last > 0, packing.documents.long().gather(1, at)[:, 0], self._document)
            self._last_run = torch.where(last > 0, places.run.gather(1, at)[:, 0], self._last_run)
        self._started = self._started | ~places.padding.all(-1)
        self.count += size
        return kept, all_places, places

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, int64 `[B']`, in this order; a row may occur several times."""
        self._kept = {name: x.index_select(0, rows) for name, x in self._kept.items()}
        for name in ("_run", "_padding", "_document", "_last_run", "_started"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self.batch = len(rows)

    def _check(self, new: dict[str, Tensor]) -> None:
        for name, x in new.items():
            old = self._kept.get(name, x)
            shapes = [(y.shape[:-2], y.shape[-1], y.dtype, y.device) for y in (old, x)]
            if shapes[0] != shapes[1] or x.shape[0] != self.batch or x.device != self.device:
                raise ValueError(
                    f"{name}: expected batch {self.batch} on {self.device} and tensors like {list(old.shape)} in "
                    f"{old.dtype}, got {list(x.shape)} in {x.dtype} on {x.device}"
                )

    def _write(self, places: Places, new: dict[str, Tensor], start: int) -> None:
        """Put new positions into memory, in place."""
        end = start + places.position.shape[0]
        for name, x in new.items():
            self._kept[name][..., start:end, :] = x
        self._position[start:end] = places.position
        self._run[:, start:end], self._padding[:, start:end] = places.run, places.padding

    def _grow(self, needed: int, places: Places, new: dict[str, Tensor]) -> None:
        """Make room for `needed` positions; if memory grows, it at least doubles."""
        if needed <= self._position.shape[0]:
            return
        memory = max(2 * self._position.shape[0], needed)

        def grown(old: Tensor | None, like: Tensor, dim: int) -> Tensor:
            shape = list(like.shape)
            shape[dim] = memory
            out = like.new_zeros(shape)
            if old is not None:
                out.narrow(dim, 0, old.shape[dim]).copy_(old)
            return out

        self._kept = {name: grown(self._kept.get(name), x, x.ndim - 2) for name, x in new.items()}
        self._position = grown(self._position, places.position, 0)
        self._run, self._padding = (
            grown(old, x, 1) for old, x in ((self._run, places.run), (self._padding, places.padding))
        )

    def _joined(self, places: Places, new: dict[str, Tensor]) -> tuple[dict[str, Tensor], Places]:
        """The kept tensors, sorted by position, followed by the new ones; and the places of all."""
        order = self._position.argsort()
        kept = {name: x.index_select(-2, order) for name, x in self._kept.items()}
        kept = {name: torch.cat([kept[name], x], dim=-2) if name in kept else x for name, x in new.items()}
        position = torch.cat([self._position[order], places.position])
        run, padding = (
            torch.cat([old[:, order], x], dim=1)
            for old, x in ((self._run, places.run), (self._padding, places.padding))
        )
        return kept, Places(position, run, padding)

    def _keep_last(self, kept: dict[str, Tensor], places: Places, count: int, window: int) -> None:
        """Keep the last `window` positions, each in its place in the ring."""
        size = min(window, places.position.shape[0])
        shift = count % window if size == window else 0
        last = places.rows(places.position.shape[0] - size, places.position.shape[0])
        self._kept = {name: x[..., -size:, :].roll(shift, dims=-2) for name, x in kept.items()}
        self._position = last.position.roll(shift)
        self._run, self._padding = last.run.roll(shift, dims=1), last.padding.roll(shift, dims=1)
