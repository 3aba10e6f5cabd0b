"""Unions and intersections of masks against dense booleans, and block masks against `create_block_mask`.

B batch, G KV heads, H query heads, N length.
"""

import random

import numpy as np
import torch
from fuzz_draws import Packing, draw_length, draw_ranks, draw_window, generator
from fuzz_oracles import Kept, document_starts
from fuzz_told import told
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dma_flex import Lifetimes, block_mask, interval_block_mask

_TABLES = (("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),)
_TABLES += (("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),)

Drawn = tuple[Lifetimes, np.ndarray, str]  # a mask, its dense form `[B or 1, G or 1, N, N]`, and how it was made


def check_masks(seed: int) -> None:
    """A drawn formula of masks equals its dense form, and so do its counts and its block mask."""
    rng = random.Random(seed)
    length, batch, kv_heads = draw_length(rng, 80), rng.randint(1, 2), rng.randint(1, 3)
    mask, dense, formula = _formula(rng, length, batch, kv_heads, rng.randint(0, 3))
    size, group = rng.choice((1, 2, 8, 16, 128)), rng.randint(1, 2)
    with told(seed, f"N {length}, B {batch}, G {kv_heads}, block {size}, {formula}"):
        assert np.array_equal(mask.to_dense().numpy(), dense), "to_dense"
        assert np.array_equal(mask.live_counts().numpy(), dense.sum(-1)), "live_counts"
        assert dense.sum(-1).max() <= mask.capacity, "capacity"
        group = group if dense.shape[1] > 1 else 1  # a mask of one head has one table for all heads
        heads = dense.shape[1] * group
        seen = torch.from_numpy(dense)
        expected = create_block_mask(
            lambda b, h, q, k: seen[b, h // group, q, k], len(dense), heads, length, length, "cpu", size
        )
        found = block_mask(mask, length, size, heads if heads > 1 else rng.choice((None, heads)))
        _assert_same_blocks(found, expected)
        _assert_blocks(found, dense, size)


def check_intervals(seed: int) -> None:
    """Masks made by hand, with arbitrary births: combining them is right or refused. Their block masks are right."""
    rng = random.Random(seed)
    length, shape = draw_length(rng, 60), (rng.randint(1, 2), rng.randint(1, 2))
    (one, dense), (other, other_dense) = (_by_hand(rng, shape, length) for _ in range(2))
    with told(seed, f"N {length}, B and G {shape}"):
        assert np.array_equal((one & other).to_dense().numpy(), dense & other_dense), "&"
        union = dense | other_dense
        edges = np.diff(union.astype(int), axis=-2, prepend=0)
        fits = (edges == 1).sum(-2).max(initial=0) <= 1
        try:
            found = (one | other).to_dense().numpy()
        except ValueError:
            found = None
        assert (found is not None) == fits, f"a union that {'fits' if fits else 'does not fit'} one interval per key"
        assert found is None or np.array_equal(found, union), "|"
        queries, size = rng.randint(1, 70), rng.choice((2, 8, 16))
        query = np.arange(queries)[:, None]
        birth, death = (x.numpy()[..., None, :] for x in (one.birth, one.death))
        found = interval_block_mask(one.birth, one.death, queries, size, num_heads=shape[1])
        _assert_blocks(found, (birth <= query) & (query < death), size)


def _formula(rng: random.Random, length: int, batch: int, kv_heads: int, depth: int) -> Drawn:
    if depth == 0:
        return _leaf(rng, length, batch, kv_heads)
    (mask, dense, one), (other, other_dense, two) = (
        _formula(rng, length, batch, kv_heads, rng.randint(0, depth - 1)) for _ in range(2)
    )
    if rng.random() < 0.5:
        return mask | other, dense | other_dense, f"({one} | {two})"
    return mask & other, dense & other_dense, f"({one} & {two})"


def _leaf(rng: random.Random, length: int, batch: int, kv_heads: int) -> Drawn:
    packing, kind = Packing.drawn(rng, batch, length), rng.choice(("causal", "window", "last", "sinks", "top_w"))
    rows, count = batch if packing.documents is not None or packing.padding is not None else 1, draw_window(rng, length)
    if kind == "top_w":
        ranks = draw_ranks(rng, (batch, kv_heads, length)).float()
        mask = Lifetimes.top_w(ranks, count, **packing.arguments())
        dense = [[Kept(count).mask(x.tolist(), *packing.row(b)) for x in row] for b, row in enumerate(ranks)]
        return mask, np.array(dense), f"top_w({count}, {packing})"
    make = {"window": Lifetimes.sliding_window, "last": Lifetimes.last, "sinks": Lifetimes.sinks}.get(kind)
    mask = make(length, count, **packing.arguments()) if make else Lifetimes.causal(length, **packing.arguments())
    dense = np.array([[_dense(kind, length, count, *packing.row(b))] for b in range(rows)])
    return mask, dense, f"{kind}({count}, {packing})"


def _dense(kind: str, length: int, count: int, documents: list[int] | None, padding: list[bool] | None) -> np.ndarray:
    starts, real = document_starts(length, documents, padding), ~np.array(padding or [False] * length)
    query, key = np.arange(length)[:, None], np.arange(length)
    inside = (key <= query) & (key >= np.array(starts)[:, None]) & real
    if kind in ("window", "last"):
        return inside & (key > query - count)
    return inside & (inside.cumsum(-1) <= count) if kind == "sinks" else inside


def _by_hand(rng: random.Random, shape: tuple[int, int], length: int) -> tuple[Lifetimes, np.ndarray]:
    source, size = generator(rng), (*(rng.choice((1, x)) for x in shape), length)
    birth = torch.randint(0, length + 1, size, generator=source, dtype=torch.int32)
    death = (birth + torch.randint(-3, length, size, generator=source)).clamp(max=length).int()
    query = np.arange(length)[:, None]
    dense = (birth.numpy()[..., None, :] <= query) & (query < death.numpy()[..., None, :])
    return Lifetimes(birth, death, length), dense


def _assert_same_blocks(found: BlockMask, expected: BlockMask) -> None:
    for names in _TABLES:
        for name in names:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def _assert_blocks(found: BlockMask, dense: np.ndarray, size: int) -> None:
    """Blocks by their definition: full if all pairs are visible and inside the mask, partial if only some are."""
    queries, keys = dense.shape[-2:]
    missing = [(0, 0), (0, 0), (0, -queries % size), (0, -keys % size)]
    blocks = np.pad(dense, missing)
    blocks = blocks.reshape(*dense.shape[:2], blocks.shape[2] // size, size, -1, size).swapaxes(3, 4)
    some, every = blocks.any((-1, -2)), blocks.all((-1, -2))
    for kind, (counts, indices) in ((some & ~every, _TABLES[0][:2]), (every, _TABLES[0][2:])):
        count, index = getattr(found, counts).numpy(), getattr(found, indices).numpy()
        group = count.shape[1] // dense.shape[1]
        listed = np.zeros((*count.shape, kind.shape[-1]), dtype=bool)
        listing = np.arange(kind.shape[-1]) < count[..., None]
        np.put_along_axis(listed, index.astype(int), listing, axis=-1)
        assert np.array_equal(listed, np.repeat(kind, group, axis=1)), counts
