"""Training on several sources of sequences, each with its share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

EXAMPLE = "{web: 0.7, books: 0.3}"  # example of weights, for messages


@dataclass(frozen=True)
class Mixture:
    """Which sequences of several sources each epoch has, and in what order.

    An epoch has as many sequences as all sources together. Each source is read in passes: a pass has all sequences of
    the source in random order. An epoch continues each source where the last epoch stopped, so no sequence is repeated
    before all others of its source have been used. The sequences of all sources are then shuffled together.

    Attributes:
        names: names of the sources.
        sizes: number of sequences of each source.
        counts: number of sequences that an epoch draws from each source.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def by_weight(cls, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float]) -> "Mixture":
        """A mixture whose counts are proportional to weights, up to rounding.

        Raises:
            ValueError: if an epoch would have no sequence of a source.
        """
        epoch, total = sum(sizes), math.fsum(weights)
        borders = [round(epoch * math.fsum(weights[:i]) / total) for i in range(len(weights) + 1)]
        counts = tuple(int(x) for x in np.diff(borders))
        if least := [name for name, count in zip(names, counts, strict=True) if not count]:
            raise ValueError(
                f"path: expected weights that give each folder at least one of the {epoch} sequences of an epoch, got "
                f"none for {least[0]}; raise its weight or leave it out"
            )
        return cls(tuple(names), tuple(sizes), counts)

    @property
    def description(self) -> str:
        """The share of each source, and how many passes through it an epoch makes."""
        parts = zip(self.names, self.sizes, self.counts, strict=True)
        return ", ".join(
            f"{count / sum(self.counts):.3g} of {name} ({count / size:.3g} passes per epoch)"
            for name, size, count in parts
        )

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The sequences of an epoch in the order of training, as int64 indices.

        Indices number the sequences of all sources: first those of the first source, then those of the second, ...

        Args:
            seed: the same for all epochs.
            epoch: number of the epoch, from 0.
        """
        first = np.cumsum([0, *self.sizes])
        drawn = [first[i] + self._drawn(i, seed, epoch) for i in range(len(self.sizes))]
        return np.random.default_rng((seed, epoch)).permutation(np.concatenate(drawn))

    def _drawn(self, source: int, seed: int, epoch: int) -> np.ndarray:
        """What an epoch draws from a source, as indices within the source."""
        size, start, stop = self.sizes[source], epoch * self.counts[source], (epoch + 1) * self.counts[source]
        passes = range(start // size, -(-stop // size))
        # The last number is never 0, so this generator is never that of `order`.
        order = [np.random.default_rng((seed, number, source + 1)).permutation(size) for number in passes]
        begin = passes.start * size
        return np.concatenate(order)[start - begin : stop - begin]


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of folders.

    Raises:
        ValueError: if there are none, or one is not a positive finite number.
    """
    if not weights:
        raise ValueError(f"path: expected a folder, or folders with weights such as {EXAMPLE}, got none")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"path: expected a positive weight for {name}, got {weight!r}; leave out unused folders")
    return {name: float(weight) for name, weight in weights.items()}
