"""Block masks equal `create_block_mask` on the same mask, table by table; masks equal their per-pair definitions."""

import generated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dma_flex import FlexPlan, Lifetimes, block_mask, interval_block_mask, key_bias_score_mod, lifetime_mask_mod
from dma_flex.block_masks import block_tables, block_tables_reference, empty_tables

TABLES = ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"]
TABLES += ["q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"]
BLOCK_SIZE = 8
ONE_OR_TWO_BLOCKS, THREE_BLOCKS_OR_MORE = st.integers(1, 2 * BLOCK_SIZE), st.integers(2 * BLOCK_SIZE + 1, 60)
# Together more than 800 cases in each run, half of them of three blocks or more.
generate = settings(max_examples=200, deadline=None, derandomize=True, database=None)
generate_few = settings(generate, max_examples=60)


def assert_same_tables(found: BlockMask, expected: BlockMask) -> None:
    assert found.shape == expected.shape
    for name in TABLES:
        x, y = getattr(found, name), getattr(expected, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


def assert_exact(case: tuple[Lifetimes, Tensor], group: int) -> None:
    """Check that a mask equals its definition, and its block mask equals PyTorch's."""
    mask, pairs = case
    dense = mask.to_dense()
    assert torch.equal(*torch.broadcast_tensors(dense, pairs))
    assert torch.equal(mask.live_counts(), dense.sum(-1))
    assert dense.sum(-1).max() <= mask.capacity
    causal_pairs = mask.length * (mask.length + 1) / 2
    torch.testing.assert_close(mask.density(), dense.sum((-1, -2)) / causal_pairs)

    (batch, heads), length = mask.death.shape[:2], mask.length
    num_heads = heads * group
    found = block_mask(mask, length, BLOCK_SIZE, num_heads)
    mask_mod = lifetime_mask_mod(mask.birth, mask.death, num_heads)
    table_heads = 1 if heads == 1 else num_heads
    assert_same_tables(found, create_block_mask(mask_mod, batch, table_heads, length, length, "cpu", BLOCK_SIZE))


@generate
@given(generated.masks(ONE_OR_TWO_BLOCKS), st.sampled_from([1, 2, 4]))
def test_masks_of_up_to_two_blocks(case: tuple[Lifetimes, Tensor], group: int) -> None:
    assert_exact(case, group)


@generate
@given(generated.masks(THREE_BLOCKS_OR_MORE), st.sampled_from([1, 2, 4]))
def test_masks_of_three_blocks_or_more(case: tuple[Lifetimes, Tensor], group: int) -> None:
    assert_exact(case, group)


def assert_same_as_pytorch(case: tuple[Tensor, Tensor, int], block_size: int) -> None:
    birth, death, q_len = case
    found = interval_block_mask(birth, death, q_len, block_size, num_heads=death.shape[1])
    mask_mod = lifetime_mask_mod(birth, death, num_heads=death.shape[1])
    expected = create_block_mask(mask_mod, *death.shape[:2], q_len, death.shape[-1], "cpu", block_size)
    assert_same_tables(found, expected)


@generate
@given(generated.intervals(ONE_OR_TWO_BLOCKS), st.sampled_from([1, BLOCK_SIZE, 64]))
def test_any_intervals_of_up_to_two_blocks(case: tuple[Tensor, Tensor, int], block_size: int) -> None:
    assert_same_as_pytorch(case, block_size)


@generate
@given(generated.intervals(THREE_BLOCKS_OR_MORE), st.sampled_from([1, 2, BLOCK_SIZE]))
def test_any_intervals_of_three_blocks_or_more(case: tuple[Tensor, Tensor, int], block_size: int) -> None:
    assert_same_as_pytorch(case, block_size)


@generate_few
@given(generated.masks(THREE_BLOCKS_OR_MORE), st.sampled_from([1, 2]), st.sampled_from([None, 8, 20]))
def test_segments_hold_the_same_mask(case: tuple[Lifetimes, Tensor], group: int, segment: int | None) -> None:
    mask, pairs = case
    length, batch, heads = mask.length, 2 if mask.death.shape[0] == 1 else mask.death.shape[0], 2
    plan = FlexPlan.of(mask, batch, heads * group, heads, segment, BLOCK_SIZE)
    slots = plan.slots
    z, q_len, keys = batch * slots.segments, slots.segment_length, slots.birth.shape[-1]
    mask_mod = lifetime_mask_mod(slots.birth, slots.death, heads * group)
    table_heads = 1 if slots.birth.shape[1] == 1 else heads * group
    assert_same_tables(plan.block_mask, create_block_mask(mask_mod, z, table_heads, q_len, keys, "cpu", BLOCK_SIZE))

    seen = slots.visible()  # [Z, G or 1, S, K]
    row = slots.copies.row[..., None, :]  # of all heads and sequences together
    assert not (seen & (row < 0)).any()
    start = torch.arange(batch * heads).view(batch, heads).repeat_interleave(slots.segments, 0) * slots.length
    key = (row - start.view(z, heads, 1, 1)).clamp(min=0).expand(z, heads, q_len, keys)
    dense = torch.zeros(z, heads, q_len, length, dtype=torch.long).scatter_add_(-1, key, seen.long().expand(key.shape))
    dense = dense.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    assert torch.equal(dense, pairs.expand(dense.shape).long())


def test_a_call_waits_for_nothing() -> None:
    with FakeTensorMode():  # raises where a value is asked for
        ranks = torch.randn(2, 2, 100)
        mask = Lifetimes.top_w(ranks, 7) | Lifetimes.sinks(100, 2) & Lifetimes.causal(100)
        assert block_mask(mask, 100, 16, num_heads=4).kv_indices.shape == (2, 4, 7, 7)
        # The operation above knows only its shapes.
        assert block_tables_reference(mask.birth, mask.death, 100, 16, num_heads=4)[1].shape == (2, 4, 7, 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_call_waits_for_nothing_on_a_gpu() -> None:
    mask = Lifetimes.top_w(torch.randn(2, 2, 1000, device="cuda"), 70)
    expected = block_mask(Lifetimes(mask.birth.cpu(), mask.death.cpu(), mask.capacity), 1000, num_heads=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = block_mask(mask, 1000, num_heads=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_tables(found.to("cpu"), expected)


def test_inside_torch_compile(device: str) -> None:
    compiled = torch.compile(block_mask, fullgraph=True, dynamic=False)
    for _ in range(2):
        mask = Lifetimes.top_w(torch.randn(2, 2, 1000, device=device), 70)
        assert_same_tables(compiled(mask, 1000, 16, 4), block_mask(mask, 1000, 16, 4))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_operation_keeps_its_promises(heads: int, device: str) -> None:
    mask = Lifetimes.top_w(torch.randn(2, heads, 100, device=device), 7)
    arguments = mask.birth, mask.death, 100, 16, 2  # one table for all heads, or no copies by query head
    torch.library.opcheck(block_tables, arguments)  # shapes, strides, nothing shared, torch.compile
    for found, room in zip(block_tables(*arguments), empty_tables(mask.death, *arguments[2:]), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (room.shape, room.stride(), room.dtype)


def test_bad_arguments() -> None:
    mask = Lifetimes.top_w(torch.randn(1, 2, 64), 8)
    with pytest.raises(ValueError, match="q_len: expected 64, the length of the mask, got 63"):
        block_mask(mask, 63)
    with pytest.raises(ValueError, match="block_size: expected a power of two, got 96"):
        block_mask(mask, 64, 96)
    with pytest.raises(ValueError, match="block_size: expected a power of two, got 0"):
        block_mask(mask, 64, 0)
    with pytest.raises(ValueError, match="num_heads: expected a multiple of the mask's 2 heads, got 3"):
        block_mask(mask, 64, num_heads=3)
    with pytest.raises(ValueError, match=r"at least one query, sequence, head and key, got 64 and \[1, 2, 0\]"):
        interval_block_mask(mask.birth[..., :0], mask.death[..., :0], 64, num_heads=2)
    with pytest.raises(ValueError, match="one shape"):
        interval_block_mask(mask.birth, mask.death[..., 1:], 64)
    with pytest.raises(ValueError, match=r"expected \[B or 1, G or 1, K\], got \[64\]"):
        lifetime_mask_mod(mask.birth[0, 0], mask.death[0, 0])


def test_query_heads_must_be_known() -> None:
    """FlexAttention looks tables and mods up by query head: those of two heads would be read beyond their end."""
    mask = Lifetimes.top_w(torch.randn(1, 2, 64), 8)
    for make in (
        lambda: block_mask(mask, 64),
        lambda: interval_block_mask(mask.birth, mask.death, 64),
        lambda: lifetime_mask_mod(mask.birth, mask.death),
        lambda: key_bias_score_mod(torch.randn(1, 2, 64)),
        lambda: key_bias_score_mod(torch.randn(1, 1, 64), query_bias=torch.randn(1, 2, 64)),
    ):
        with pytest.raises(ValueError, match=r"num_heads: expected the number of query heads, .* give num_heads=2, or"):
            make()
    shared = Lifetimes(mask.birth[:, :1], mask.death[:, :1], mask.capacity)  # one mask for any number of heads
    assert block_mask(shared, 64).kv_indices.shape[1] == 1
