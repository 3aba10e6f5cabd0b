"""The Triton plan of segments equals the plain one in every slot, including empty ones."""

import masks
import pytest
import torch
from poison import poisoned_buffers
from torch._subclasses.fake_tensor import FakeTensorMode

from dma_kernels import Lifetimes
from dma_kernels.segments.fill_slots import segment_slots_reference
from dma_kernels.segments.slots import segment_slots

pytest.importorskip("triton")
from dma_kernels.segments import slot_kernels as module
from dma_kernels.segments.slot_kernels import launch_segment_slots

ON_GPU = torch.cuda.is_available()
NAMES = ("row", "birth", "death", "first", "slot")
SIZES = [
    (1, 16, 16, 16),
    (63, 64, 16, 8),
    (63, 128, 32, 32),
    (111, 112, 112, 16),
    (111, 112, 16, 1),
    (257, 320, 64, 16),
]
KINDS = ["top_w", "top_w and last", "sliding", "sinks", "causal", "by hand", "none"]


def make_mask(kind: str, batch: int, kv_heads: int, length: int, device: str) -> Lifetimes:
    """A mask in which segments have few or many keys, early or late ones."""
    window = max(1, length // 6)
    ranks = torch.randn(batch, kv_heads, length, device=device)
    if kind == "top_w":
        return Lifetimes.top_w(ranks, window)
    if kind == "top_w and last":
        documents, padding = masks.make_documents(batch, length), masks.make_padding("between", batch, length)
        given = {"documents": documents.to(device), "padding": padding.to(device)}
        return Lifetimes.top_w(ranks, window, keep_last=5, sinks=2, **given)
    if kind == "sliding":
        return Lifetimes.sliding_window(length, window, device)
    if kind == "sinks":
        return Lifetimes.sinks(length, 3, device) | Lifetimes.last(length, window, device)
    if kind == "causal":
        return Lifetimes.causal(length, device)
    birth = torch.arange(length, dtype=torch.int32, device=device).expand(batch, kv_heads, -1)
    if kind == "none":
        return Lifetimes(birth, torch.zeros_like(birth), 1, born_at_position=True)
    far = torch.tensor([-5, 0, 1, 2, 40, length, 2**31 - 1 - length], dtype=torch.int32, device=device)
    return Lifetimes(birth, birth + far[torch.randint_like(birth, 7)], length)


def check(
    mask: Lifetimes, batch: int, kv_heads: int, length: int, segment: int, block_size: int, **launch: int
) -> None:
    """Compare all five outputs for a length filled up to `length`."""
    sizes = (mask.capacity, batch, kv_heads, length, segment, block_size)
    names = ("capacity", "batch", "num_kv_heads", "length", "segment_length", "block_size")
    with poisoned_buffers():
        found = launch_segment_slots(mask.death, **dict(zip(names, sizes, strict=True)), **launch)
    expected = segment_slots_reference(mask.birth, mask.death, *sizes)
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert x.dtype == y.dtype == torch.int32, name
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "filled", "segment", "block_size"), SIZES)
def test_slots(length: int, filled: int, segment: int, block_size: int, kind: str, device: str) -> None:
    batch, kv_heads = (2, 2) if length == 63 or ON_GPU else (1, 1)
    mask = make_mask(kind, batch, kv_heads, length, device)
    check(mask, batch, kv_heads, filled, segment, block_size, block=32)


def test_sorting_by_64_bits(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(module, "_sort_dtype", lambda *_: torch.int64)
    check(make_mask("top_w and last", 2, 2, 63, device), 2, 2, 64, 16, 8)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["top_w", "top_w and last"])
def test_shared_masks(kind: str, shape: tuple[int, int], device: str) -> None:
    """A mask for one sequence or one head is that of all."""
    check(make_mask(kind, *shape, 63, device), 2, 2, 64, 16, 8, block=16)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_as_on_a_gpu(kind: str, device: str) -> None:
    check(make_mask(kind, 1, 2, 1025, device), 1, 2, 1152, 384, 128)


@pytest.mark.parametrize("kind", ["top_w", "sliding"])
def test_operation(kind: str, device: str) -> None:
    mask = make_mask(kind, 2, 2, 63, device)
    arguments = (mask.birth, mask.death, mask.capacity, 2, 2, 64, 16, 8)
    torch.library.opcheck(segment_slots, arguments)
    found, expected = segment_slots(*arguments), segment_slots_reference(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with FakeTensorMode() as mode:
        fake = segment_slots(*(mode.from_tensor(x) for x in arguments[:2]), *arguments[2:])
    assert [x.shape for x in fake] == [x.shape for x in found]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["random", "drifting", "sliding", "sinks"])
@pytest.mark.parametrize(("length", "segment"), [(32768, 1024), (131072, 1024), (32768, 8192)])
def test_long_sequences(length: int, segment: int, kind: str, device: str) -> None:
    ranks = torch.randn(1, 2, length, device=device)
    if kind == "drifting":
        ranks += torch.linspace(0, 5, length, device=device)
    mask = Lifetimes.top_w(ranks, 1000, keep_last=64 * (kind == "drifting"))
    if kind in ("sliding", "sinks"):
        mask = Lifetimes.last(length, 1000, device)
    if kind == "sinks":
        mask |= Lifetimes.sinks(length, 4, device)
    check(mask, 1, 2, length, segment, 128)
