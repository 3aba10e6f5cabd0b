"""The definitions in plain Python and NumPy, from `docs` and the paper. This file uses no code of the packages.

B batch, H query heads, G KV heads, N length, D head dim.
"""

import math
from bisect import insort
from dataclasses import dataclass

import numpy as np

_LARGEST_EXPONENT = 128  # of float32: numbers from 2**128 on are infinite
_FINEST = 2.0 ** (-149 + 7)  # the step of float32's smallest numbers, less the seven bits that are not compared


def comparable(rank: float | int) -> tuple[int, float | int]:
    """What ranks are compared by: float32 rounded half to even to 16 mantissa bits. NaN is largest, and -0.0 is 0.0.

    Integers are compared as they are.
    """
    if isinstance(rank, int):
        return 0, rank
    with np.errstate(over="ignore"):
        rank = float(np.float32(rank))
    if math.isnan(rank):
        return 1, 0.0
    if math.isinf(rank) or rank == 0:
        return 0, rank + 0.0
    _, exponent = math.frexp(rank)
    step = max(2.0 ** (exponent - 17), _FINEST)
    rounded = round(rank / step) * step
    return 0, math.copysign(math.inf, rank) if abs(rounded) >= 2.0**_LARGEST_EXPONENT else rounded + 0.0


def document_starts(length: int, documents: list[int] | None, padding: list[bool] | None) -> list[int]:
    """For each position, where its document begins. Padding belongs to the document of the real position before it."""
    starts, current, start = [], None, 0
    for t in range(length):
        real = padding is None or not padding[t]
        if real and documents is not None:
            if current is not None and documents[t] != current:
                start = t
            current = documents[t]
        starts.append(start)
    return starts


@dataclass(frozen=True)
class Kept:
    """What a query keeps: the last positions, the best `window` keys before them, and its document's first keys."""

    window: int
    keep_last: int = 0
    sinks: int = 0

    def mask(
        self, ranks: list[float] | list[int], documents: list[int] | None, padding: list[bool] | None
    ) -> np.ndarray:
        """One head's mask, bool `[N, N]` (query, key)."""
        length = len(ranks)
        mask = np.zeros((length, length), dtype=bool)
        starts = document_starts(length, documents, padding)
        real = [padding is None or not padding[t] for t in range(length)]
        past: list[
            tuple[tuple[int, float | int], int]
        ] = []  # (rank, position), ascending: of two equal ranks, the later wins
        for t in range(length):
            past = past if t and starts[t] == starts[t - 1] else []
            if real[t]:
                insort(past, (comparable(ranks[t]), t))
            settled = [j for _, j in past if j <= t - self.keep_last]
            mask[t, settled[-self.window :]] = True
            mask[t, sorted(j for _, j in past)[: self.sinks]] = True
            recent = range(max(starts[t], t - self.keep_last + 1), t + 1)
            mask[t, [j for j in recent if real[j]]] = True
        return mask


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scores: np.ndarray, mask: np.ndarray, scale: float, grad: np.ndarray
) -> list[np.ndarray]:
    """Output and gradients of q, k, v and scores in float64, by the formulas of softmax and its derivative.

    Args:
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`.
        v: `[B, G, N, D]`.
        scores: `[B, G, N]`.
        mask: bool `[B, G, N, N]`; a query without keys gives 0.
        scale: factor of q·k.
        grad: of the output.
    """
    q, k, v, scores, grad = (np.asarray(x, np.float64) for x in (q, k, v, scores, grad))
    group = q.shape[1] // k.shape[1]
    k_full, v_full, bias, seen = (np.repeat(x, group, axis=1) for x in (k, v, scores, mask))
    logits = np.where(seen, q @ k_full.swapaxes(-1, -2) * scale + bias[..., None, :], -np.inf)
    largest = logits.max(-1, keepdims=True)
    p = np.exp(logits - np.where(np.isfinite(largest), largest, 0))
    p /= np.maximum(p.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    out = p @ v_full
    dp = grad @ v_full.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    by_head = ds.swapaxes(-1, -2) @ q * scale, p.swapaxes(-1, -2) @ grad, ds.sum(-2)
    shape = (q.shape[0], k.shape[1], group)
    dk, dv, dscores = (x.reshape(*shape, *x.shape[2:]).sum(2) for x in by_head)
    return [out, ds @ k_full * scale, dk, dv, dscores]
