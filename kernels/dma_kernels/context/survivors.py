"""The keys of a list that later queries may see: the best-ranked, the last, and the first keys of its last document.

The list may be a part of a sequence, or the joined survivors of earlier parts. The survivors of joined survivors are
the survivors of all keys of these parts.

Z lists, n keys, K survivors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dma_kernels.keep_rule import KeepRule
from dma_kernels.lifetime_masks import is_sink
from dma_kernels.packing import Packing
from dma_kernels.selection.deaths import KeyOrder


@dataclass(frozen=True)
class Reach:
    """How many keys of each kind a query sees before a position.

    Attributes:
        best: number of best-ranked keys, of those before the last positions.
        last: number of last positions, padded ones included.
        first: number of first real keys of the document.
    """

    best: int
    last: int
    first: int

    @classmethod
    def of(cls, keep: KeepRule) -> "Reach":
        """The reach under a keep rule. The last r positions of a query are its own and the r - 1 before it."""
        return cls(keep.window, max(keep.last - 1, 0), keep.sinks)

    @classmethod
    def of_window(cls, window: int) -> "Reach":
        """The reach under a sliding window of `window` positions, the query's own included."""
        return cls(0, window - 1, 0)

    @property
    def count(self) -> int:
        """Maximum number of keys of all kinds together."""
        return self.best + self.last + self.first


def survivors(ranks: Tensor, reach: Reach, packing: Packing, count: int) -> Tensor:
    """Places of the keys that a query after the end of the list may see, ascending.

    If there are fewer than `count`, the latest of the other keys fill up the rest. These do not change the selection,
    since a key that has left the best never comes back.

    Args:
        ranks: `[Z, 1, n]`, as in `Lifetimes.selected`; the keys are in the order of their positions, and the last
            `reach.last` of them are consecutive.
        reach: the number of keys of each kind.
        packing: documents and padding of the Z rows; runs count from 0, and there are at most n.
        count: K, at most n; `reach.count` is enough.

    Returns:
        int64 `[Z, K]`.
    """
    rows, _, length = ranks.shape
    place = torch.arange(length, device=ranks.device)
    if count >= length:
        return place.expand(rows, -1)
    competing = max(length - reach.last, 0)
    needed = (place >= competing).repeat(rows, 1)  # [Z, n]
    best = min(reach.best, competing)
    if best:
        runs, padding = (None if x is None else x[:, :competing] for x in (packing.runs, packing.padding))
        order = KeyOrder.of_ranks(ranks[..., :competing].detach(), runs, padding).key[:, 0]
        needed.scatter_(-1, order[:, competing - best :], True)
    if reach.first:
        sinks = is_sink(reach.first, place[None, None], packing)[:, 0].expand(rows, -1)
        if packing.padding is not None:
            sinks = sinks & ~packing.padding
        needed |= sinks if packing.runs is None else sinks & (packing.runs == packing.runs[:, -1:])
    wanted = torch.where(needed, place + length, place)
    return wanted.topk(count, dim=-1).indices.sort(dim=-1).values
