"""A small set of combinations that contains every pair of values of any two axes."""

import itertools
import random
from typing import Any


def covering(*axes: list[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value per axis. Any two values of two axes occur together in one of them. Deterministic."""
    rng, chosen = random.Random(0), []
    sizes = [range(len(axis)) for axis in axes]
    open_pairs = {
        (i, x, j, y) for i, j in itertools.combinations(range(len(axes)), 2) for x in sizes[i] for y in sizes[j]
    }
    while open_pairs:
        candidates = [tuple(rng.choice(size) for size in sizes) for _ in range(100)]
        best = max(candidates, key=lambda c: len(_pairs(c) & open_pairs))
        open_pairs -= _pairs(best)
        chosen.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
    return chosen


def _pairs(combination: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
    return {(i, x, j, y) for (i, x), (j, y) in itertools.combinations(enumerate(combination), 2)}
