"""Which sequences each process reads, and in what order."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

Order = Callable[[int, int], np.ndarray]  # indices of the sequences of an epoch, from its seed and number


class Sequences(Protocol):
    """A data set of sequences with a known length; each item is a `Batch` without its dimension B."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class TrainSampler(DistributedSampler):
    """One process's part of each global batch, in an order that only seed and epoch decide.

    An epoch is an order of sequences, by default a permutation of all, cut into global batches of `ranks * batch_size`.
    Each process takes its slice of every global batch. So any number of processes trains on the same sequences in the
    same step. The rest at an epoch's end is dropped. The class is a `DistributedSampler` so that Lightning does not
    replace it.

    Args:
        count: number of sequences.
        batch_size: sequences in a batch of each process.
        ranks: number of processes.
        rank: rank of this process.
        seed: seed of the order.
        position: returns the epoch, and how many of its batches were trained on; called when an iteration begins.
            Default: the start of the epoch that `set_epoch` set.
        order: function that returns the order of the `count` sequences in an epoch. Default: a permutation.

    Raises:
        ValueError: if there are too few sequences for one global batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        position: Callable[[], tuple[int, int]] | None = None,
        order: Order | None = None,
    ) -> None:
        data: Any = range(count)  # torch expects a data set but uses only its length
        super().__init__(data, num_replicas=ranks, rank=rank, seed=seed)
        self.count, self.batch_size, self.position, self.order = count, batch_size, position, order or self._permuted
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
        order = self.order(self.seed, epoch)
        slices = order[: self.batches * self.global_batch].reshape(self.batches, self.num_replicas, self.batch_size)
        return map(int, slices[done:, self.rank].reshape(-1))

    def _permuted(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(self.count)


class EvalSampler(DistributedSampler):
    """Every sequence once, in order; process r takes the r-th sequence of every `ranks`.

    Collective operations need the same number from every process, so indices from `count` on fill up the last turn; see
    `PaddedDataset`.

    Args:
        count: number of sequences.
        ranks: number of processes.
        rank: rank of this process.
    """

    def __init__(self, count: int, ranks: int = 1, rank: int = 0) -> None:
        data: Any = range(count)  # as in `TrainSampler`
        super().__init__(data, num_replicas=ranks, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class PaddedDataset(Dataset):
    """A data set that returns sequences without labels, which no metric counts, for indices from its length on.

    Args:
        dataset: a data set of `Batch` items.
        ignore_index: the label that stands for no token.
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
