"""A cache of every key.

B batch, H query heads, G KV heads, n new positions, N positions in all, D head dim.
"""

import torch
from torch import Tensor

from dma_kernels.decode_attention import decode_attention
from dma_kernels.key_cache import Attention
from dma_kernels.lifetimes import Lifetimes
from dma_kernels.segment_attention import segment_attention


class FullCache:
    """A cache that keeps every key: for comparison, and for a `keep_window_size` that is changed between calls.

    A call costs O(n N) for N positions read so far. Arguments as `DynamicMaskCache`; keys, values, scores, ranks,
    documents and padding of all positions are kept.
    """

    def __init__(
        self,
        batch: int,
        keep_window_size: int,
        keep_last: int = 0,
        sinks: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if batch < 1 or keep_window_size < 1 or min(keep_last, sinks) < 0:
            raise ValueError(
                "expected batch and keep_window_size >= 1, keep_last and sinks >= 0, "
                f"got {batch}, {keep_window_size}, {keep_last} and {sinks}"
            )
        self.keep_window_size, self.keep_last, self.sinks = keep_window_size, keep_last, sinks
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self._kept: dict[str, Tensor] = {}

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
        """As `DynamicMaskCache.attend`, from all that has been read."""
        batch, new = k.shape[0], k.shape[2]
        if documents is None:  # the document goes on
            last = (
                self._kept["document"][:, -1:]
                if self._kept
                else torch.zeros(batch, 1, dtype=torch.int64, device=k.device)
            )
            documents = last.expand(batch, new)
        if padding is None:
            padding = torch.zeros(batch, new, dtype=torch.bool, device=k.device)
        arrived = {"key": k, "value": v, "score": scores, "rank": ranks}
        arrived |= {"document": documents.long(), "padding": padding}
        first = not self._kept
        for name, x in arrived.items():
            dim = 1 if x.ndim == 2 else 2
            self._kept[name] = x if first else torch.cat([self._kept[name], x], dim=dim)
        kept = self._kept
        mask = Lifetimes.top_w(
            kept["rank"],
            self.keep_window_size,
            documents=kept["document"],
            padding=kept["padding"],
            keep_last=self.keep_last,
            sinks=self.sinks,
        )
        self.length += new
        if first:
            return attention(q, k, v, scores, mask)
        query = torch.arange(mask.length - new, mask.length, device=k.device)[:, None]
        visible = (mask.birth[..., None, :] <= query) & (query < mask.death[..., None, :])  # [B, G, n, N]
        return decode_attention(q, kept["key"], kept["value"], kept["score"], visible)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may be named several times."""
        self._kept = {name: x.index_select(0, rows) for name, x in self._kept.items()}
        self.length = self.length.index_select(0, rows)
