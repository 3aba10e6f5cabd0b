"""The Triton selection gives the deaths of the plain one, bit for bit."""

import masks
import pytest
import torch
from poison import poisoned_buffers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dma_kernels import Lifetimes
from dma_kernels.scores import ordered_bits
from dma_kernels.selection import (
    LOWEST_PRIORITY,
    RANK_BITS,
    KeyOrder,
    deaths_by_priority,
    priority_bits,
    top_w_deaths,
)

pytest.importorskip("triton")
from dma_kernels.triton_selection import Tiling, _sorted_index, launch_top_w_deaths

ON_GPU = torch.cuda.is_available()
LENGTHS = [1, 63, 111, 257, 1025]
SMALL = Tiling(32, 32, 16)
TILINGS = [SMALL, Tiling(16, 64, 64), None] if ON_GPU else [Tiling(64, 64, 64)]


def make_priority(kind: str, batch: int, kv_heads: int, length: int, device: str) -> Tensor:
    """Priorities `[B, G, N]` as `Lifetimes.top_w` makes them of ranks."""
    ranks = torch.randn(batch, kv_heads, length, device=device)
    drift = torch.linspace(0, 5, length, device=device)
    if kind in ("ties", "equal"):
        ranks = ranks.round() * (kind == "ties")
    elif kind in ("up", "down"):
        ranks += drift if kind == "up" else -drift
    elif kind == "rising":
        ranks = drift.expand_as(ranks)
    elif kind == "special":
        special = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf], device=device)
        ranks = torch.where(torch.rand_like(ranks) < 0.3, special[torch.randint_like(ranks, 6).long()], ranks)
    priority = ordered_bits(ranks) >> (32 - RANK_BITS)
    if kind == "documents":
        priority = (masks.make_documents(batch, length).to(device).cumsum(-1)[:, None] << RANK_BITS) + priority
    return priority


def check(priority: Tensor, window: int, tiling: Tiling | None, real: Tensor | None = None) -> None:
    """Compare the deaths of all keys, or of the `real` ones."""
    with poisoned_buffers():
        found = launch_top_w_deaths(priority, window, priority_bits(priority), tiling)
    expected = top_w_deaths(KeyOrder.of(priority), window)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if real is not None:
        keys = KeyOrder.of(priority, excluded=~real)
        assert torch.equal(found[real.expand_as(found)], top_w_deaths(keys, window)[real.expand_as(found)])


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "up", "down", "rising", "special", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_deaths(length: int, kind: str, tiling: Tiling | None, device: str) -> None:
    batch, kv_heads = (2, 2) if length < 100 or ON_GPU else (1, 1)
    priority = make_priority(kind, batch, kv_heads, length, device)
    for window in masks.windows(length):
        check(priority, window, tiling)


@pytest.mark.parametrize("tiling", [Tiling(16, 64, 64), Tiling(32, 16, 16), Tiling(16, 16, 128), SMALL, None], ids=str)
@pytest.mark.parametrize("window", [1, 50])
def test_tilings(tiling: Tiling | None, window: int, device: str) -> None:
    check(make_priority("up", 1, 2, 111, device), window, tiling)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["left", "right", "between"])
def test_padding_counts_for_nothing(kind: str, dtype: torch.dtype, device: str) -> None:
    padding = masks.make_padding(kind, 2, 111).to(device)[:, None]
    priority = make_priority("random", 2, 2, 111, device).to(dtype).masked_fill(padding, LOWEST_PRIORITY)
    check(priority, 7, SMALL, real=~padding)


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128])
def test_rows_are_sorted_by_themselves(rows: int, device: str) -> None:
    """Up to 127 rows as 32 bits; the extreme ranks of neighbours touch."""
    ranks = torch.tensor([torch.nan, -torch.inf, torch.inf, 0, -1], device=device)
    priority = (ordered_bits(ranks) >> (32 - RANK_BITS)).expand(rows, 5)
    expected = priority.sort(stable=True).indices + 5 * torch.arange(rows, device=device)[:, None]
    for x in (priority, priority.long()):
        assert torch.equal(_sorted_index(x, priority_bits(x)), expected.flatten())


def test_dropped_bits_tell_no_ranks_apart() -> None:
    ranks = torch.cat([torch.randn(10_000), torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, -3e38, 1e-45])])
    bits = ordered_bits(ranks).unique()
    short = bits >> (32 - RANK_BITS)
    assert torch.equal(short.unique(), short)
    assert short.min() > LOWEST_PRIORITY


def test_non_contiguous_priorities(device: str) -> None:
    check(make_priority("random", 2, 111, 3, device).transpose(1, 2), 9, SMALL)


def test_empty_batch(device: str) -> None:
    assert launch_top_w_deaths(torch.zeros(0, 2, 9, dtype=torch.int32, device=device), 3, RANK_BITS).shape == (0, 2, 9)


@pytest.mark.parametrize("window", [1, 5, 70])
@pytest.mark.parametrize("length", [1, 63])
def test_operation(length: int, window: int, device: str) -> None:
    priority = make_priority("ties", 2, 2, length, device)
    expected = top_w_deaths(KeyOrder.of(priority), window)
    assert torch.equal(deaths_by_priority(priority, window), expected)
    torch.library.opcheck(deaths_by_priority, (priority, window))
    with FakeTensorMode():
        fake = deaths_by_priority(torch.empty(2, 2, length, dtype=torch.int32), window)
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


def test_top_w_compiles_to_one_graph(device: str) -> None:
    ranks, documents = torch.randn(2, 2, 111, device=device), masks.make_documents(2, 111).to(device)
    padding = masks.make_padding("between", 2, 111).to(device)

    def death(ranks: Tensor) -> Tensor:
        return Lifetimes.top_w(ranks, 9, documents=documents, padding=padding, keep_last=2, sinks=1).death

    assert torch.equal(torch.compile(death, fullgraph=True, backend="aot_eager")(ranks), death(ranks))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "up", "down", "documents"])
@pytest.mark.parametrize("length", [32768, 131072, 150_001])
def test_long_sequences(length: int, kind: str, device: str) -> None:
    for window in (1, 1024, length // 2):
        check(make_priority(kind, 1, 2, length, device), window, None)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_million_positions(device: str) -> None:
    check(make_priority("random", 1, 1, 1 << 20, device), 1024, None)
