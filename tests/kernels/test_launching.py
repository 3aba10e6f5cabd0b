"""Operations launch kernels on CUDA, and run their definition elsewhere. Their CUDA form is also called on a CPU."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from dma_kernels import Lifetimes, SegmentSlots
from dma_kernels.attention.key_gradients import key_gradients
from dma_kernels.launching import on_device_of_first, register_launch
from dma_kernels.segments.gather import gather_rows, sum_copies
from dma_kernels.segments.slots import segment_slots
from dma_kernels.selected_blocks.choice import best_blocks
from dma_kernels.selection.ops import deaths_by_rank


@torch.library.custom_op("dma_tests::label", mutates_args=())
def label(x: Tensor, number: int) -> Tensor:
    """An operation with three forms, which its result tells apart."""
    return torch.full_like(x, number)


@register_launch(label, without_triton=lambda x, number: torch.full_like(x, -number))
def _(x: Tensor, number: int) -> Tensor:
    return torch.full_like(x, 10 * number)


def call_form(device: str, operation: CustomOpDef, *arguments: Any) -> Any:
    """Call the form of an operation for a device, wherever its arguments are."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
    return operation._opoverload.redispatch(keys, *arguments)


@pytest.mark.parametrize("triton", [False, True])
def test_each_device_has_its_form(triton: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dma_kernels.launching.has_triton", lambda: triton)
    x = torch.zeros(2, device=device)
    assert label(x.cpu(), 3).tolist() == call_form("cpu", label, x, 3).tolist() == [3, 3]
    assert call_form("cuda", label, x, 3).tolist() == ([30, 30] if triton else [-3, -3])
    assert torch.equal(label(x, 3), call_form(device, label, x, 3))


def make_cases(device: str) -> Iterable[tuple[CustomOpDef, tuple[Any, ...]]]:
    """Operations and arguments."""
    ranks = torch.randn(2, 2, 63, device=device).round()
    mask = Lifetimes.top_w(ranks, 9)
    yield deaths_by_rank, (ranks, None, None, 9)
    yield segment_slots, (mask.birth, mask.death, mask.capacity, 2, 2, 64, 32, 16)
    slots = SegmentSlots.plain(mask, 2, 2, segment_length=32, block_size=16)
    copies, birth, death = slots.copies, slots.birth, slots.death
    x = torch.randint(9, (2, 2, 64, 16), device=device).float()  # integers: sums have no error
    yield gather_rows, (x, copies.row, copies.first, copies.slot)
    rows = copies.gather(x)
    yield sum_copies, (rows, copies.row, copies.first, copies.slot, list(x.shape))
    q = torch.randn(birth.shape[0], 4, 32, 16, device=device)
    k, lse = torch.randn(*birth.shape, 16, device=device), torch.full(q.shape[:3], 9.0, device=device)
    run, block_run = torch.zeros(2, 63, dtype=torch.int64, device=device), mask.birth[:, 0, :14] * 0
    yield best_blocks, (torch.randn(2, 4, 63, 16, device=device), x[:, :, :14], run, run, block_run, 8, 4, 8, 5)
    yield key_gradients, (q, k, k.flip(0), k[..., 0].contiguous(), birth, death, lse, lse.sin(), q.flip(0), 0.25)


def test_the_forms_of_all_operations_agree(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("dma_kernels.launching.has_triton", lambda: True)
    for operation, arguments in make_cases(device):
        found, expected = (call_form(x, operation, *arguments) for x in ("cuda", "cpu"))
        torch.testing.assert_close(found, expected, msg=lambda text, name=operation._qualname: f"{name}: {text}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_gpu_of_the_first_argument_is_the_current_one() -> None:
    current = on_device_of_first(lambda x, other: torch.cuda.current_device())
    x = torch.zeros(1, device="cuda:1")
    assert current(x, x.cpu()) == 1
    assert current(x.cpu(), x) == torch.cuda.current_device() == 0
