"""A cache of every key.

B batch, H query heads, G KV heads, n new positions, N positions in all, D head dim.
"""

import torch
from torch import Tensor

from dma_kernels.attention.torch_backend import segment_attention
from dma_kernels.decoding.attention import Attention, attend_from_last, decode_attention
from dma_kernels.decoding.dynamic_cache import FEW
from dma_kernels.decoding.state import NewKeys
from dma_kernels.keep_rule import HasKeepRule, KeepRule
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.packing import Packing
from dma_kernels.ranks import saturated


class FullCache(HasKeepRule):
    """A cache that keeps every key: for comparison, and for a keep rule that changes between calls.

    A call costs O(n N) for N positions read so far, or O(N w) if n is more than a few. Arguments as in
    `DynamicMaskCache`. It keeps keys, values, biases, ranks, documents and padding of all positions.
    """

    def __init__(self, batch: int, keep: KeepRule | int, *, device: torch.device | str | None = None) -> None:
        if batch < 1:
            raise ValueError(f"expected batch >= 1, got {batch}")
        self.keep = keep if isinstance(keep, KeepRule) else KeepRule(keep)
        self.length, self.document = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def attend(self, q: Tensor, new: NewKeys, attention: Attention = segment_attention) -> Tensor:
        """Like `DynamicMaskCache.attend`, with the keys of all positions read so far."""
        new.check(q)
        real, count = new.real, q.shape[2]
        documents = self.document[:, None].expand_as(real) if new.documents is None else new.documents.long()
        kept = {"key": new.key, "value": new.value, "key_bias": saturated(new.key_bias), "rank": new.rank}
        kept |= {"document": documents, "padding": ~real}
        self._check_fits(kept)
        if self._kept:
            kept = {name: torch.cat([self._kept[name], x], dim=min(2, x.ndim - 1)) for name, x in kept.items()}
        else:
            kept = {name: x.detach().clone() for name, x in kept.items()}  # the caller may overwrite its tensors
        packing = Packing.of(kept["document"], kept["padding"])
        mask = Lifetimes.selected(kept["rank"], self.keep, packing)
        past = mask.length - count
        if past and count <= FEW:
            query = torch.arange(past, mask.length, device=q.device)[:, None]
            visible = (mask.birth[..., None, :] <= query) & (query < mask.death[..., None, :])  # [B, G, n, N]
            out = decode_attention(q, kept["key"], kept["value"], kept["key_bias"], visible, new.query_bias)
        else:
            keys = kept["key"], kept["value"], kept["key_bias"]
            out = attend_from_last(attention, q, keys, mask, new.query_bias)
        last = torch.where(real, torch.arange(1, count + 1, device=q.device), 0).amax(-1)  # last real one, from 1
        latest = documents.gather(1, (last - 1).clamp(min=0)[:, None]).squeeze(1)
        self.document = torch.where(last > 0, latest, self.document)
        self.length = self.length + count
        self._kept = kept
        return out

    def _check_fits(self, arrived: dict[str, Tensor]) -> None:
        """Raise `ValueError` unless new keys match the cached keys in shape and dtype."""
        key, new = self._kept.get("key", arrived["key"]), arrived["key"]
        shapes = [(x.shape[0], x.shape[1], x.shape[3], x.dtype) for x in (key, new)]
        if len(self.length) != len(new) or shapes[0] != shapes[1]:
            raise ValueError(
                f"k: expected batch {len(self.length)} and keys like {list(key.shape)} in {key.dtype}, "
                f"got {list(new.shape)} in {new.dtype}"
            )
        ranks = [self._kept.get("rank", arrived["rank"]), arrived["rank"]]
        if ranks[0].is_floating_point() != ranks[1].is_floating_point():
            raise ValueError(f"ranks: expected {ranks[0].dtype} as for earlier keys, got {ranks[1].dtype}")

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may occur several times."""
        self._kept = {name: x.index_select(0, rows) for name, x in self._kept.items()}
        self.length, self.document = self.length.index_select(0, rows), self.document.index_select(0, rows)
