"""Which sequences each process reads, and in which order."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler


class Sequences(Protocol):
    """A data set of sequences whose number is known; each is the content of a `Batch` without its dimension B."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class TrainSampler(DistributedSampler):
    """One process's part of each global batch, in an order that only seed and epoch decide.

    An epoch is a permutation of all sequences, cut into global batches of `ranks * batch_size`; a process takes its
    slice of each. So any split of a global batch over processes trains on the same sequences in the same step. What is
    left over at an epoch's end is dropped. That it is a `DistributedSampler` keeps Lightning from replacing it.

    Args:
        count: number of sequences.
        batch_size: sequences in a batch of each process.
        ranks: number of processes.
        rank: of this process.
        seed: of the order.
        position: gives the epoch, and how many of its batches were trained on; asked whenever an iteration begins.
            Default: the start of the epoch of `set_epoch`.

    Raises:
        ValueError: if there is not one global batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        position: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        data: Any = range(count)  # torch asks for a data set, and uses its length alone
        super().__init__(data, num_replicas=ranks, rank=rank, seed=seed)
        self.count, self.batch_size, self.position = count, batch_size, position
        self.global_batch = ranks * batch_size
        self.batches = count // self.global_batch
        if not self.batches:
            raise ValueError(
                f"training data: expected at least batch_size * processes = {self.global_batch} sequences, "
                f"got {count}; lower data.batch_size or give more data"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        epoch, done = (self.epoch, 0) if self.position is None else self.position()
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        slices = order[: self.batches * self.global_batch].reshape(self.batches, self.num_replicas, self.batch_size)
        return map(int, slices[done:, self.rank].reshape(-1))


class EvalSampler(DistributedSampler):
    """Every sequence once, in order; process r takes the r-th of each `ranks`.

    All processes get equally many, as collective operations need it: indices from `count` on are filled up, see
    `PaddedDataset`.

    Args:
        count: number of sequences.
        ranks: number of processes.
        rank: of this process.
    """

    def __init__(self, count: int, ranks: int = 1, rank: int = 0) -> None:
        data: Any = range(count)  # as for `TrainSampler`
        super().__init__(data, num_replicas=ranks, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class PaddedDataset(Dataset):
    """A data set whose indices from its length on give sequences without labels, which no metric counts.

    Args:
        dataset: of `Batch` items.
        ignore_index: the label of no token.
    """

    def __init__(self, dataset: Sequences, ignore_index: int) -> None:
        self.dataset, self.ignore_index = dataset, ignore_index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index % len(self)]
        if index < len(self):
            return item
        label_bytes = {"label_bytes": torch.tensor(0)} if "label_bytes" in item else {}
        return item | {"labels": item["labels"].clone().fill_(self.ignore_index)} | label_bytes
