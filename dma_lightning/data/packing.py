"""Whole documents side by side in sequences of one length.

N sequence length, D documents.
"""

from bisect import bisect_left, insort

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.data.conversations import Conversations


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Put documents into rows by best fit, longest first: each goes to the row where it leaves the least room.

    Args:
        lengths: lengths of the documents, `[D]`, each at most `room`.
        room: length of a row.

    Returns:
        The documents of each row, in ascending order; rows are in the order of their first document.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by their free room
    rooms: list[int] = []  # the keys, in ascending order
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            free, row = room, len(rows)
            rows.append([])
        else:
            free = rooms[place]
            row = with_room[free].pop()
            if not with_room[free]:
                del with_room[free], rooms[place]
        rows[row].append(document)
        if left := free - length:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(row)
    return sorted(map(sorted, rows))


class PackedAnswers(Dataset):
    """Sequences of whole documents that do not see each other; only tokens of answers are labels.

    The last token of a document is never an input, only a label. So a document of N + 1 tokens fits. Items have
    `documents`, `padding` and `label_bytes`; see `Batch`.

    Args:
        conversations: the documents.
        chosen: numbers of those to use, int64.
        sequence_length: N.
    """

    def __init__(self, conversations: Conversations, chosen: np.ndarray, sequence_length: int) -> None:
        self.conversations, self.sequence_length = conversations, sequence_length
        self.starts, self.ends = conversations.starts, conversations.ends
        rows = pack(conversations.lengths[chosen] - 1, sequence_length)
        self.documents = chosen[np.array([x for row in rows for x in row], np.int64)]
        self.borders = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length, data = self.sequence_length, self.conversations
        inputs, labels = np.zeros(length, np.int64), np.full(length, IGNORE_INDEX, np.int64)
        documents, size, place = np.zeros(length, np.int64), 0, 0
        chosen = self.documents[self.borders[index] : self.borders[index + 1]]
        for number, document in enumerate(chosen.tolist()):
            start, end = int(self.starts[document]), int(self.ends[document])
            row, label = slice(place, place + end - start - 1), slice(start + 1, end)
            inputs[row] = data.tokens[start : end - 1]
            labels[row] = np.where(data.is_answer[label], data.tokens[label], IGNORE_INDEX)
            documents[place:] = number  # padding counts to the last document
            size += int(data.sizes[label][data.is_answer[label]].sum())
            place = row.stop
        arrays = {"input_ids": inputs, "labels": labels, "documents": documents, "padding": np.arange(length) >= place}
        return {name: torch.from_numpy(x) for name, x in arrays.items()} | {"label_bytes": torch.tensor(size)}
