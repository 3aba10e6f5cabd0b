"""The dynamic mask, its counts and its segments against the definition, pair by pair.

B batch, G KV heads, N length, T segments, S segment length, K slots.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from fuzz_draws import DEVICE, Packing, draw_length, draw_ranks, draw_window
from fuzz_oracles import Kept
from fuzz_told import told

from dma_kernels import Lifetimes, SegmentSlots, reference_mask

_DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SelectionCase:
    """A selection, and its mask by the definition."""

    ranks: torch.Tensor
    kept: Kept
    packing: Packing

    @classmethod
    def drawn(cls, rng: random.Random) -> "SelectionCase":
        batch, kv_heads, length = rng.choice((1, 1, 2, 3)), rng.randint(1, 3), draw_length(rng)
        ranks = draw_ranks(rng, (batch, kv_heads, length)).to(rng.choice(_DTYPES))
        if rng.random() < 0.3:
            ranks = ranks.transpose(1, 2).contiguous().transpose(1, 2)
        kept = Kept(draw_window(rng, length), rng.choice((0, 0, 1, 3, length + 2)), rng.choice((0, 0, 1, 4)))
        return cls(ranks, kept, Packing.drawn(rng, batch, length))

    def arguments(self) -> dict:
        """Arguments of `Lifetimes.top_w`, except ranks and window."""
        return {"keep_last": self.kept.keep_last, "sinks": self.kept.sinks, **self.packing.arguments(DEVICE)}

    def expected(self) -> np.ndarray:
        """Bool `[B, G, N, N]`."""
        heads = [[self.kept.mask(x.tolist(), *self.packing.row(b)) for x in row] for b, row in enumerate(self.ranks)]
        return np.array(heads)

    def __str__(self) -> str:
        return f"ranks {list(self.ranks.shape)} {self.ranks.dtype}, {self.kept}, {self.packing}"


def check_selection(seed: int) -> None:
    """The dense form and the counts of `Lifetimes.top_w`, the O(N²) reference, and the slots of segments."""
    rng = random.Random(seed)
    case = SelectionCase.drawn(rng)
    with told(seed, case):
        expected, ranks = case.expected(), case.ranks.to(DEVICE)
        mask = Lifetimes.top_w(ranks, case.kept.window, **case.arguments())
        assert np.array_equal(mask.to_dense().cpu().numpy(), expected), "to_dense"
        assert np.array_equal(mask.live_counts().cpu().numpy(), expected.sum(-1)), "live_counts"
        length = mask.length
        density = expected.sum((-1, -2)) / (length * (length + 1) / 2)
        assert np.allclose(mask.density().cpu().numpy(), density, rtol=1e-6, atol=0), "density"
        assert expected.sum(-1).max() <= mask.capacity, "capacity"
        reference = reference_mask(ranks, case.kept.window, **case.arguments())
        assert np.array_equal(reference.cpu().numpy(), expected), "reference_mask"
        segment, block_size = rng.choice((None, 1, 7, 16, length + 3)), rng.choice((1, 2, 16))
        check_slots(SegmentSlots.plain(mask, *expected.shape[:2], segment, block_size), expected)
        check_slots(SegmentSlots.of(mask, *expected.shape[:2], rng.choice((None, 1, 20)), 16), expected)


def check_slots(slots: SegmentSlots, expected: np.ndarray) -> None:
    """Each visible pair is in exactly one slot, and no other pair is in any. Row numbers count over all heads."""
    batch, kv_heads, _, length = expected.shape
    segments = slots.filled_length // slots.segment_length
    row, birth, death = (x.cpu().numpy() for x in (slots.copies.row, slots.birth, slots.death))
    query = np.arange(slots.segment_length)[:, None]
    seen = (birth[:, :, None] <= query) & (query < death[:, :, None])  # [Z, G, S, K]
    z, g, s, slot = np.broadcast_to(seen, (batch * segments, kv_heads, *seen.shape[2:])).nonzero()
    number = row[z, g, slot]
    assert (number >= 0).all(), "an empty slot is seen"
    head, key = np.divmod(number, slots.filled_length)
    b, t = np.divmod(z, segments)
    assert np.array_equal(head, b * kv_heads + g), "a slot holds another head's key"
    query = t * slots.segment_length + s
    inside = query < length
    _assert_each_once(b[inside], g[inside], query[inside], key[inside], expected)


def _assert_each_once(b: np.ndarray, g: np.ndarray, query: np.ndarray, key: np.ndarray, expected: np.ndarray) -> None:
    pairs = np.zeros(expected.shape, dtype=int)
    np.add.at(pairs, (b, g, query, key), 1)
    assert np.array_equal(pairs, expected), "pairs in segments"
