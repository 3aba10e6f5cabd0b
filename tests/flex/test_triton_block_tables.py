"""Triton's block tables equal the plain ones bit for bit: on a GPU if there is one, else under Triton's interpreter."""

import itertools

import pytest
import torch
from poison import poisoned_buffers
from torch import Tensor

from dma_flex.block_masks import block_tables, block_tables_reference, empty_tables

pytest.importorskip("triton")
from dma_flex.triton_block_tables import launch_block_tables

ON_GPU = torch.cuda.is_available()
LENGTHS, BLOCK_SIZES, HEADS = [1, 63, 111, 257, 1025], [8, 16, 64, 128], [(1, 1), (1, 4), (2, 2), (2, 8)]
CASES = list(itertools.product(LENGTHS, LENGTHS, BLOCK_SIZES, HEADS, [1, 2], [False, True]))
FEWER_CASES = CASES[::61]  # every pair of lengths, since each has 64 cases; all block sizes and heads


def make_lifetimes(q_len: int, keys: int, batch: int, heads: int, in_order: bool, device: str) -> tuple[Tensor, Tensor]:
    """Births and deaths `[B, G, K]`, not contiguous: arbitrary, or ordered and long enough to fill blocks."""
    birth = torch.randint(-3, q_len + 3, (batch, keys, heads), device=device).int().mT
    if in_order:
        birth = birth.contiguous().sort().values
        return birth, (birth[:1] + q_len // 2 + torch.arange(keys, device=device) % 5).int().expand_as(birth)
    death = birth + torch.randint(-2, 2 * q_len, (batch, heads, 2 * keys), device=device)[..., ::2].int()
    for value in (2**31 - 1, -(2**31)):
        never = torch.rand(birth.shape, device=device) < 0.1
        birth, death = (x.masked_fill(never, value) for x in (birth, death))
    return birth, death.masked_fill(torch.rand(birth.shape, device=device) < 0.1, 2**31 - 1)


def assert_same_bits(birth: Tensor, death: Tensor, q_len: int, block_size: int, num_heads: int) -> None:
    with poisoned_buffers():
        found = empty_tables(death, q_len, block_size, num_heads)
        launch_block_tables(birth, death, found, q_len=q_len, block_size=block_size)
    expected = block_tables_reference(birth, death, q_len, block_size, num_heads)
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.dtype == y.dtype == torch.int32
        assert x.is_contiguous()
        assert torch.equal(x, y), number


@pytest.mark.parametrize("case", CASES if ON_GPU else FEWER_CASES, ids=str)
def test_tables(case: tuple[int, int, int, tuple[int, int], int, bool], device: str) -> None:
    q_len, keys, block_size, (heads, num_heads), batch, in_order = case
    birth, death = make_lifetimes(q_len, keys, batch, heads, in_order, device)
    assert_same_bits(birth, death, q_len, block_size, num_heads)


# A tile takes at most 1024 keys, 1024 blocks of queries, or 256 blocks of a row.
@pytest.mark.parametrize(
    ("q_len", "keys", "block_size", "in_order"),
    [
        *((5, 3, 1, False), (1100, 3, 1, False), (1030, 2, 1, True), (2, 257, 1, False), (300, 2, 1, True)),
        *((5000, 5000, 2048, False), (5000, 5000, 2048, True), (300, 100, 2**20, True)),
    ],
)
def test_rows_and_blocks_of_several_tiles(q_len: int, keys: int, block_size: int, in_order: bool, device: str) -> None:
    birth, death = make_lifetimes(q_len, keys, 1, 1, in_order, device)
    assert_same_bits(birth, death, q_len, block_size, 2)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    ("q_len", "keys", "block_size"),
    [(32768, 32768, 128), (4096, 36864, 128), (65537, 4097, 16), (3001, 3001, 1), (300001, 300001, 128)],
)
def test_long_sequences(q_len: int, keys: int, block_size: int, in_order: bool, device: str) -> None:
    birth, death = make_lifetimes(q_len, keys, 2, 2, in_order, device)
    assert_same_bits(birth, death, q_len, block_size, 4)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_more_sequences_than_a_grid_has_programs_on_its_second_axis(device: str) -> None:
    birth, death = make_lifetimes(257, 257, 70_000, 1, False, device)
    assert_same_bits(birth, death, 257, 128, 1)


def test_the_operation_gives_the_same_bits(device: str) -> None:
    birth, death = make_lifetimes(257, 111, 2, 2, True, device)
    expected = block_tables_reference(birth, death, 257, 16, 4)
    assert all(torch.equal(x, y) for x, y in zip(block_tables(birth, death, 257, 16, 4), expected, strict=True))


def test_every_kind_of_block_occurs(device: str) -> None:
    for in_order in (False, True):
        tables = block_tables_reference(*make_lifetimes(257, 257, 2, 2, in_order, device), 257, 16, 2)
        partial, full = tables[0].sum(), tables[2].sum()
        assert partial > 0
        assert partial + full < tables[1].numel() or not in_order
        assert full > 0 or not in_order
