"""Tokens on disk as sequences of one length.

N sequence length.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.data.shards import Shard

_NO_ENDS = np.empty(0, np.int64)


class TokenWindows(Dataset):
    """Consecutive windows of each shard; the label of a token is the token after it.

    Args:
        shards: parts of shards; the rest of a part after its last window is not read.
        sequence_length: N, the length of a window.
        separate_documents: number the documents of a window from 0, for attention that stays within each; the last
            token of a document then has no label.

    If the bytes of tokens are known, items have `label_bytes`; see `Batch`.
    """

    def __init__(self, shards: list[Shard], sequence_length: int, separate_documents: bool = False) -> None:
        self.shards, self.sequence_length, self.separate_documents = shards, sequence_length, separate_documents
        windows = [max(0, shard.stop - shard.start - 1) // sequence_length for shard in shards]
        self.first = np.cumsum([0, *windows])  # first window of each shard

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        shard, start = self.shards[number], (index - int(self.first[number])) * self.sequence_length
        tokens = torch.from_numpy(shard.tokens[start : start + self.sequence_length + 1].astype(np.int64))
        item = {"input_ids": tokens[:-1], "labels": tokens[1:]}
        ends = _NO_ENDS
        if self.separate_documents:
            # A document that ends at e has its last token at e - 1, and the next its first at e.
            position = shard.start + start
            span = np.searchsorted(shard.ends, (position + 1, position + self.sequence_length + 1), side="left")
            ends = shard.ends[span[0] : span[1]] - position
            item |= self._separated(tokens[1:].clone(), torch.from_numpy(ends))
        label_bytes = shard.bytes_of(start + 1, start + self.sequence_length + 1, without=ends - 1)
        if label_bytes is not None:
            item["label_bytes"] = torch.from_numpy(np.array(label_bytes, np.int64))  # torch.tensor takes twice as long
        return item

    def _separated(self, labels: Tensor, ends: Tensor) -> dict[str, Tensor]:
        """Labels within each document, and the number of each token's document."""
        documents = torch.zeros(self.sequence_length, dtype=torch.int64)
        labels[ends - 1] = IGNORE_INDEX
        documents[ends[ends < self.sequence_length]] = 1
        return {"labels": labels, "documents": documents.cumsum(0)}
