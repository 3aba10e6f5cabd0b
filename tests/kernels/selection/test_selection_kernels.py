"""The Triton selection gives the same deaths as the plain one, bit for bit."""

import itertools

import masks
import pytest
import torch
from covering import covering
from poison import poisoned_buffers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dma_kernels import Lifetimes
from dma_kernels.packing import document_runs
from dma_kernels.ranks import ordered_bits
from dma_kernels.selection.deaths import LOWEST_PRIORITY, RANK_BITS, KeyOrder, key_priorities, top_w_deaths
from dma_kernels.selection.ops import deaths_by_rank

pytest.importorskip("triton")
from dma_kernels.selection.kernels import Tiling, launch_sort_keys, launch_split_rows, launch_top_w_deaths

ON_GPU = torch.cuda.is_available()
LENGTHS = [1, 63, 111, 257, 1025]
SMALL = Tiling(32, 32, 16)
TILINGS = [SMALL, Tiling(16, 64, 64), None] if ON_GPU else [Tiling(64, 64, 64)]
KINDS = ["random", "ties", "equal", "up", "down", "rising", "special", "documents", "integers", "integer documents"]
WINDOWS = [1, 7, "N - 1", "N", "N + 5"]
# Under the interpreter every pair of values; on a GPU all.
DEATHS = (itertools.product if ON_GPU else covering)(LENGTHS, WINDOWS, KINDS, TILINGS)


def make_ranks(kind: str, batch: int, kv_heads: int, length: int, device: str) -> Tensor:
    """Ranks `[B, G, N]` of a kind that has broken a selection, or could."""
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
    elif kind.startswith("integer"):
        ends = torch.tensor([-(2**63), 2**63 - 1, 0, 1 << 40], device=device)
        ranks = ends[torch.randint_like(ranks, 4).long()] + ranks.mul(4).long()  # some go round
    return ranks


def make_runs(batch: int, length: int, device: str) -> Tensor:
    """Document numbers `[B, N]`."""
    return document_runs(masks.make_documents(batch, length), None).to(device)


def check(
    ranks: Tensor,
    window: int,
    tiling: Tiling | None,
    runs: Tensor | None = None,
    padding: Tensor | None = None,
) -> None:
    """Compare the deaths of all keys that take part in the selection."""
    with poisoned_buffers():
        found = launch_top_w_deaths(ranks, runs, padding, window=window, tiling=tiling)
    keys = KeyOrder.of_ranks(ranks, runs, padding)
    expected = top_w_deaths(keys, window)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if padding is not None:
        keys, real = KeyOrder.of_sorted(keys.key, excluded=padding[:, None]), ~padding[:, None].expand_as(found)
        assert torch.equal(found[real], top_w_deaths(keys, window)[real])


@pytest.mark.parametrize(("length", "window", "kind", "tiling"), DEATHS, ids=str)
def test_deaths(length: int, window: int | str, kind: str, tiling: Tiling | None, device: str) -> None:
    batch, kv_heads = (2, 2) if length < 100 or ON_GPU else (1, 1)
    ranks = make_ranks(kind, batch, kv_heads, length, device)
    runs = make_runs(batch, length, device) if "documents" in kind else None
    window = {"N - 1": max(1, length - 1), "N": length, "N + 5": length + 5}.get(window, window)
    check(ranks, window, tiling, runs)


@pytest.mark.parametrize("tiling", [Tiling(16, 64, 64), Tiling(32, 16, 16), Tiling(16, 16, 128), SMALL, None], ids=str)
@pytest.mark.parametrize("window", [1, 50])
def test_tilings(tiling: Tiling | None, window: int, device: str) -> None:
    check(make_ranks("up", 1, 2, 111, device), window, tiling)


@pytest.mark.parametrize("window", [1, 20, 70])
@pytest.mark.parametrize("last", [1, 16, 70])
def test_keys_die_later(last: int, window: int, device: str) -> None:
    ranks, runs = make_ranks("random", 2, 2, 63, device), make_runs(2, 63, device)
    expected = (top_w_deaths(KeyOrder.of_ranks(ranks, runs), window) + last).clamp(max=63)
    with poisoned_buffers():
        assert torch.equal(launch_top_w_deaths(ranks, runs, None, window=window, last=last, tiling=SMALL), expected)
    assert torch.equal(deaths_by_rank(ranks, runs, None, window, last), expected)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["left", "right", "between"])
@pytest.mark.parametrize("ranks", ["random", "integers"])
def test_padding_counts_for_nothing(kind: str, documents: bool, ranks: str, device: str) -> None:
    runs = make_runs(2, 111, device) if documents else None
    padding = masks.make_padding(kind, 2, 111).to(device)
    check(make_ranks(ranks, 2, 2, 111, device), 7, SMALL, runs, padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
def test_sort_keys_order_as_priorities_do(dtype: torch.dtype, documents: bool, device: str) -> None:
    """Also of ranks, documents and padding that lie in memory in another way."""
    ranks = make_ranks("special", 2, 300, 3, device).to(dtype).transpose(1, 2)
    padding = torch.rand(300, 2, device=device).T < 0.1
    runs = make_runs(2, 300, device).T.contiguous().T if documents else None
    priority, found = key_priorities(ranks, runs, padding), launch_sort_keys(ranks, runs, padding).view(6, 300)
    spread = found.diff(dim=0)
    assert torch.equal(found - found[:, :1], (priority - priority[..., :1]).flatten(0, 1))
    assert (spread > 0).all()  # every key of a row below every key of the next


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128])
def test_rows_are_sorted_by_themselves(rows: int, documents: bool, device: str) -> None:
    """Up to 127 rows as 32 bits; the extreme ranks of neighbors touch."""
    ranks = torch.tensor([torch.nan, -torch.inf, torch.inf, 0, -1], device=device).expand(1, rows, 5)
    runs = torch.tensor([[0, 0, 0, 1, 4]], device=device) if documents else None
    priority = key_priorities(ranks, runs)
    expected = priority.sort(stable=True).indices + 5 * torch.arange(rows, device=device)[:, None]
    key = launch_sort_keys(ranks, runs)
    assert key.dtype == (torch.int32 if rows < 128 and not documents else torch.int64)
    assert torch.equal(key.sort(stable=True).indices, expected.flatten())


@pytest.mark.parametrize("rows", [1, 2, 3, 65])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_sorted_keys_are_split_by_rows(rows: int, length: int, device: str) -> None:
    """Several blocks, whose borders are not those of rows."""
    index = torch.randperm(rows * length, device=device)
    expected = index[(index // length).sort(stable=True).indices]
    assert torch.equal(launch_split_rows(index, rows, length, block=16), expected)


def test_many_rows_of_integers(device: str) -> None:
    check(make_ranks("integers", 13, 5, 20, device), 3, SMALL)


def test_dropped_bits_tell_no_ranks_apart() -> None:
    ranks = torch.cat([torch.randn(10_000), torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, -3e38, 1e-45])])
    bits = ordered_bits(ranks).unique()
    short = bits >> (32 - RANK_BITS)
    assert torch.equal(short.unique(), short)
    assert short.min() > LOWEST_PRIORITY


def test_non_contiguous_ranks(device: str) -> None:
    for kind in ("random", "integers"):
        check(make_ranks(kind, 2, 111, 3, device).transpose(1, 2), 9, SMALL)


def test_empty_batch(device: str) -> None:
    assert launch_top_w_deaths(torch.zeros(0, 2, 9, device=device), None, None, window=3).shape == (0, 2, 9)


@pytest.mark.parametrize("window", [1, 5, 70])
@pytest.mark.parametrize("length", [1, 63])
def test_operation(length: int, window: int, device: str) -> None:
    ranks, padding = make_ranks("ties", 2, 2, length, device), masks.make_padding("between", 2, length).to(device)
    for arguments in ((ranks, None, None, window), (ranks, make_runs(2, length, device), padding, window, 0)):
        expected = top_w_deaths(KeyOrder.of_ranks(*arguments[:3]), window)
        assert torch.equal(deaths_by_rank(*arguments), expected)
        torch.library.opcheck(deaths_by_rank, arguments)
    with FakeTensorMode():
        fake = deaths_by_rank(torch.empty(2, 2, length), None, None, window)
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


def test_top_w_compiles_to_one_graph(device: str) -> None:
    ranks, documents = torch.randn(2, 2, 111, device=device), masks.make_documents(2, 111).to(device)
    padding = masks.make_padding("between", 2, 111).to(device)

    def death(ranks: Tensor) -> Tensor:
        return Lifetimes.top_w(ranks, 9, documents=documents, padding=padding, keep_last=2, sinks=1).death

    assert torch.equal(torch.compile(death, fullgraph=True, backend="aot_eager")(ranks), death(ranks))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("rising", "special")])
@pytest.mark.parametrize("length", [32768, 131072, 150_001])
def test_long_sequences(length: int, kind: str, device: str) -> None:
    runs = make_runs(1, length, device) if "documents" in kind else None
    for window in (1, 1024, length // 2):
        check(make_ranks(kind, 1, 2, length, device), window, None, runs)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_million_positions(device: str) -> None:
    check(make_ranks("random", 1, 1, 1 << 20, device), 1024, None)
