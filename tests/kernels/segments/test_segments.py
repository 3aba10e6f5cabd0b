"""Slots hold exactly the live keys, in the promised order; their gather has the right gradient."""

import masks
import pytest
import torch
from torch import Tensor

from dma_kernels import Lifetimes, SegmentSlots


def by_sequence(x: Tensor, slots: SegmentSlots) -> Tensor:
    """`[Z, G, ...] -> [B, G, T, ...]`."""
    return x.unflatten(0, (-1, slots.segments)).transpose(1, 2)


def keys_of(slots: SegmentSlots) -> Tensor:
    """Position of the key in each slot, `[B, G, T, K]`; -1 if empty. Checks that keys are of the slot's own head."""
    row = by_sequence(slots.copies.row, slots)
    head = torch.arange(row.shape[0] * row.shape[1]).view(*row.shape[:2], 1, 1)
    assert ((row < 0) | (row // slots.filled_length == head)).all()
    return torch.where(row < 0, -1, row.long() % slots.filled_length)


@pytest.mark.parametrize("segment_length", [None, 1, 8, 50, 1000])
@pytest.mark.parametrize("case", masks.CASES, ids=str)
def test_slots_show_every_query_its_live_keys_once(case: masks.Case, segment_length: int | None) -> None:
    length = 111
    lifetimes = Lifetimes.top_w(torch.randn(2, 3, length), 13, **case.arguments(2, length))
    slots = SegmentSlots.plain(lifetimes, 2, 3, segment_length)
    seen = by_sequence(slots.visible(), slots)  # [B, G, T, S, K]
    key = keys_of(slots)[..., None, :].expand(seen.shape)
    dense = torch.zeros(*seen.shape[:-1], length, dtype=torch.long)
    dense.scatter_add_(-1, key.clamp(min=0), (seen & (key >= 0)).long())
    dense = dense.flatten(2, 3)[:, :, :length]
    assert torch.equal(dense, lifetimes.to_dense().long())


@pytest.mark.parametrize("block_size", [1, 16])
def test_snapshots_are_sorted_by_death_and_own_keys_by_time(block_size: int) -> None:
    lifetimes = Lifetimes.top_w(torch.randn(1, 2, 257), 20)
    segments = SegmentSlots.plain(lifetimes, 1, 2, segment_length=24, block_size=block_size)
    segment = segments.segment_length
    slots = segments.birth.shape[-1] - segment
    assert segment % block_size == 0
    assert slots % block_size == 0
    snapshot, own = keys_of(segments).split([slots, segment], dim=-1)
    assert (snapshot[:, :, 0] == -1).all()
    deaths = by_sequence(segments.death, segments)[..., :slots]
    assert (deaths[..., 1:] <= deaths[..., :-1]).all()
    alive = own >= 0
    assert (alive[..., 1:] <= alive[..., :-1]).all()  # packed to the front
    assert (own[..., 1:] > own[..., :-1])[alive[..., 1:]].all()


def test_one_segment_needs_no_snapshot() -> None:
    assert keys_of(SegmentSlots.plain(Lifetimes.causal(63), 1, 1)).shape == (1, 1, 1, 63)


@pytest.mark.parametrize("shared", [False, True], ids=["per head", "shared"])
def test_gather_and_its_gradient(shared: bool) -> None:
    ranks = torch.randn(1, 1, 41) if shared else torch.randn(2, 3, 41)
    slots = SegmentSlots.plain(Lifetimes.top_w(ranks, 5), 2, 3, segment_length=8)
    x = torch.randn(2, 3, 41, 4, dtype=torch.float64).transpose(-1, -2).contiguous().transpose(-1, -2)
    x.requires_grad_()
    rows, key = by_sequence(slots.gather_plain(x), slots), keys_of(slots)
    expected = torch.stack([x[b, g, key[b, g].clamp(min=0)] for b in range(2) for g in range(3)]).view(rows.shape)
    torch.testing.assert_close(rows, expected * (key >= 0)[..., None])
    assert torch.equal(slots.gather(x), slots.gather_plain(x))
    assert torch.autograd.gradcheck(slots.gather_plain, x)
    assert torch.autograd.gradcheck(slots.gather, x)


def test_gather_sums_copies_in_float32() -> None:
    lifetimes = Lifetimes.causal(256)
    slots = SegmentSlots.plain(lifetimes, 1, 1, segment_length=1)  # key 0 has 256 copies
    x = torch.zeros(1, 1, 256, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = slots.gather_plain(x)
    rows.backward(torch.full_like(rows, 1.0 + 2**-7))
    assert x.grad[0, 0, 0, 0] == 256 * (1.0 + 2**-7)  # a running sum in bfloat16 stops growing at 256


def test_empty_slots_stop_nan_in_both_directions() -> None:
    slots = SegmentSlots.plain(Lifetimes.top_w(torch.randn(1, 1, 40), 5), 1, 1, segment_length=8)
    x = torch.randn(1, 1, 40, 2, requires_grad=True)
    rows = slots.gather_plain(x)
    grad = torch.ones_like(rows).masked_fill((slots.copies.row < 0)[..., None], torch.nan)
    rows.backward(grad)
    assert x.grad.isfinite().all()


def test_split_and_join_are_inverse() -> None:
    slots = SegmentSlots.plain(Lifetimes.causal(41), 2, 3, segment_length=8)
    x = torch.randn(2, 3, 41, 4)
    assert by_sequence(slots.split_queries(x), slots).shape == (2, 3, 6, 8, 4)
    assert torch.equal(slots.join_queries(slots.split_queries(x)), x)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="segment_length and block_size >= 1, got 0 and 1"):
        SegmentSlots.plain(Lifetimes.causal(8), 1, 1, segment_length=0)
