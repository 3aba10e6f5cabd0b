"""A cache of every key.

B batch, H query heads, G KV heads, n new positions, N positions in all, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.attention.plain import segment_attention
from dma_kernels.decoding.attention import decode_attention
from dma_kernels.decoding.dynamic_cache import FEW, Attention, check_new_keys
from dma_kernels.lifetimes import Lifetimes
from dma_kernels.scores import saturated


class FullCache:
    """A cache that keeps every key: for comparison, and for a `keep_window_size` that is changed between calls.

    A call costs O(n N) for N positions read so far, or O(N w) for more than a few n. Arguments as `DynamicMaskCache`;
    keys, values, scores, ranks, documents and padding of all positions are kept.
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
        self.length, self.document = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
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
        check_new_keys(q, k, v, scores, ranks, documents, padding)
        batch, new = k.shape[0], k.shape[2]
        real = torch.ones(batch, new, dtype=torch.bool, device=k.device) if padding is None else ~padding
        documents = self.document[:, None].expand(batch, new) if documents is None else documents.long()
        kept = {"key": k, "value": v, "score": saturated(scores), "rank": ranks}
        kept |= {"document": documents, "padding": ~real}
        self._check_fits(kept)
        if self._kept:
            kept = {name: torch.cat([self._kept[name], x], dim=min(2, x.ndim - 1)) for name, x in kept.items()}
        else:
            kept = {name: x.detach().clone() for name, x in kept.items()}  # what was given may be written over
        mask = Lifetimes.top_w(
            kept["rank"],
            self.keep_window_size,
            documents=kept["document"],
            padding=kept["padding"],
            keep_last=self.keep_last,
            sinks=self.sinks,
        )
        past = mask.length - new
        if past and new <= FEW:
            query = torch.arange(past, mask.length, device=k.device)[:, None]
            visible = (mask.birth[..., None, :] <= query) & (query < mask.death[..., None, :])  # [B, G, n, N]
            out = decode_attention(q, kept["key"], kept["value"], kept["score"], visible)
        else:
            q = F.pad(q, (0, 0, past, 0))  # what was asked before is not asked again
            out = attention(q, kept["key"], kept["value"], kept["score"], mask)[:, :, past:]
        last = torch.where(real, torch.arange(1, new + 1, device=k.device), 0).amax(-1)  # the last real one, from 1
        latest = documents.gather(1, (last - 1).clamp(min=0)[:, None]).squeeze(1)
        self.document = torch.where(last > 0, latest, self.document)
        self.length = self.length + new
        self._kept = kept
        return out

    def _check_fits(self, arrived: dict[str, Tensor]) -> None:
        """Raise `ValueError` unless new keys are like those that are kept."""
        key, new = self._kept.get("key", arrived["key"]), arrived["key"]
        shapes = [(x.shape[0], x.shape[1], x.shape[3], x.dtype) for x in (key, new)]
        if len(self.length) != len(new) or shapes[0] != shapes[1]:
            raise ValueError(
                f"k: expected batch {len(self.length)} and keys like {list(key.shape)} in {key.dtype}, "
                f"got {list(new.shape)} in {new.dtype}"
            )

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may be named several times."""
        self._kept = {name: x.index_select(0, rows) for name, x in self._kept.items()}
        self.length, self.document = self.length.index_select(0, rows), self.document.index_select(0, rows)
