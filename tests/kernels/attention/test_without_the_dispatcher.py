"""Outside torch.compile, attention bypasses PyTorch's dispatcher, with the same bits, unless something must see it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dma_kernels import Lifetimes, fused_attention
from dma_kernels.attention import ops
from dma_kernels.launching import dispatched


class Watcher(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inputs(device: str) -> list[Tensor]:
    """q, k, v and ranks, of 63 positions."""
    pytest.importorskip("triton")
    shapes = [(2, 4, 63, 16), (2, 2, 63, 16), (2, 2, 63, 16), (2, 2, 63)]
    return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]


def attend(inputs: list[Tensor]) -> Tensor:
    return fused_attention(*inputs, Lifetimes.top_w(inputs[3], 9))


def test_the_same_bits(inputs: list[Tensor]) -> None:
    direct = attend(inputs)
    grad = torch.randn_like(direct)
    found = [direct, *torch.autograd.grad(direct, inputs, grad)]
    with Watcher() as watcher:
        through = attend(inputs)
        expected = [through, *torch.autograd.grad(through, inputs, grad)]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert "AttendSlots" in direct.grad_fn.name()
    names = {"dma_kernels::top_w_deaths", "dma_kernels::segment_slots"}
    assert names | {"dma_kernels::attend_slots", "dma_kernels::attend_slots_backward"} <= set(watcher.seen)


def test_no_operation_is_called(inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attend_slots", "attend_slots_backward"):
        monkeypatch.setattr(ops, name, lambda *_, **__: pytest.fail("went through the dispatcher"))
    attend(inputs).sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_a_second_gradient_is_refused(inputs: list[Tensor]) -> None:
    gradients = torch.autograd.grad(attend(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="attend_slots_backward"):
        gradients[0].sum().backward()


def test_selective_checkpointing_sees_it(inputs: list[Tensor]) -> None:
    expected = torch.autograd.grad(attend(inputs).square().sum(), inputs)
    seen = []

    def policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        seen.append(operation.name())
        return CheckpointPolicy.MUST_SAVE if "attend_slots" in seen[-1] else CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(
        lambda *x: attend(list(x)), *inputs, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert "dma_kernels::attend_slots" in seen
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_what_must_see_operations(device: str) -> None:
    x = torch.zeros(2, device=device)
    assert not dispatched(x, None, torch.nn.Parameter(x))
    assert dispatched(x, x.as_subclass(type("Other", (Tensor,), {})))
    with FakeTensorMode():
        assert dispatched(x)
    assert torch.func.grad(lambda y: y.sum() * dispatched(x))(x).all()
