"""Attention to parts of a sequence in several processes equals that to the whole sequence in one."""

import functools
from pathlib import Path

import pytest
import torch
from context_cases import Case, cases, draw
from context_processes import COMPILED, PROCESSES, attended, results
from once import once, shared_folder
from together import run_together
from torch import Tensor

from dma_kernels import KeepRule, Packing, reference_attention, reference_mask
from dma_kernels.context import ContextGroup, PartPacking, Traffic, exchange_keys, exchange_window
from dma_kernels.fixed_point import drift_sums
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.units import UNIT

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What the processes have computed: for the name of each case, its parts."""
    compute_all = functools.partial(run_together, HERE / "context_processes.py", processes=PROCESSES)
    folder = once(shared_folder(tmp_path_factory), "context", compute_all)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def expected(case: Case) -> list[Tensor]:
    """Output and gradients of the whole sequence, by the definition."""
    drawn = draw(case)
    q, k, v, bias, steps = (x.requires_grad_() for x in drawn.trained)
    packing = {"documents": drawn.documents, "padding": drawn.padding}
    if case.window is not None:
        mask = Lifetimes.sliding_window(case.length, case.window, "cpu", **packing).to_dense()
    else:
        sizes = {"keep_last": case.keep.last, "sinks": case.keep.sinks}
        drift = steps.detach() if case.drift else None
        mask = reference_mask(drawn.content, case.keep.window, **packing, **sizes, drift=drift)
    counted = steps if drawn.padding is None else steps.masked_fill(drawn.padding[:, None], 0)
    sums = drift_sums(counted.detach()).double() * UNIT
    nats = counted.cumsum(-1)
    nats = sums + nats - nats.detach()
    out = reference_attention(q, k, v, bias + nats, mask, query_bias=-nats)
    trained = [q, k, v, bias] + [steps] * (case.drift > 0)
    return [out, *torch.autograd.grad(out, trained, drawn.out_gradient)]


def check(case: Case, parts: list[list[Tensor]]) -> None:
    """Compare the results of all parts with those of the whole."""
    wanted = expected(case)
    for i, whole in enumerate(wanted):
        joined = torch.cat([part[i] for part in parts], dim=2)[:, :, : case.length]
        torch.testing.assert_close(joined, whole, rtol=0, atol=1e-10, msg=lambda text, i=i: f"{i}: {text}")
    assert len(wanted) == len(parts[0])


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_parts_are_the_whole(case: Case, found: list[dict[str, list[Tensor]]]) -> None:
    number = cases().index(case)
    ranks = range(PROCESSES) if case.parts == PROCESSES else (2 * (number % 2), 2 * (number % 2) + 1)
    check(case, [found[rank][case.name] for rank in ranks])


def test_compiled_parts_are_the_whole(found: list[dict[str, list[Tensor]]]) -> None:
    check(COMPILED, [part["compiled"] for part in found])


def test_a_later_part_that_is_not_finite_changes_no_output(found: list[dict[str, list[Tensor]]]) -> None:
    *earlier, last = (part["not finite"] for part in found)
    assert last[0].isnan().any()
    assert all(x.isfinite().all() for part in earlier for x in part[:2])  # and of keys, what the last part sees is NaN


def test_tensors_of_all_dtypes_in_one_message(found: list[dict[str, list[Tensor]]]) -> None:
    halves, wide, weights = [], [], []
    for rank in range(PROCESSES):
        torch.manual_seed(rank)
        halves.append(torch.randn(3, 5).bfloat16().mT)
        wide.append(torch.randn(2, dtype=torch.float64))
        others = torch.randint(9, (3,), dtype=torch.int8), torch.randn(0, 2), torch.tensor(rank), torch.tensor([True])
        for part in found:
            got = part["gathered"]
            for x, y in zip(got, (halves[rank], wide[rank], *others), strict=False):
                assert torch.equal(x[rank], y)
                assert x.dtype == y.dtype
        weights.append(1 + torch.arange(PROCESSES) / (128 if rank else 1))
    for rank, part in enumerate(found):  # sums in float32 and float64, rounded at the end
        weight = sum(x[rank] for x in weights)
        assert torch.equal(part["gathered"][-2], torch.full((5, 3), weight).bfloat16())
        square = sum(x[rank].double() ** 2 for x in weights)
        torch.testing.assert_close(part["gathered"][-1], 2 * square * wide[rank], rtol=1e-12, atol=0)


def test_bytes_are_counted_in_both_directions(found: list[dict[str, int]]) -> None:
    """Of a message with tensors that begin at multiples of 16 bytes, and of sums in at least float32."""
    message, sums = 32 + 16 + 16 + 0 + 16 + 16, 4 * 15 + 8 * 2
    assert [part["bytes"] for part in found] == [2 * (PROCESSES - 1) * (message + sums)] * PROCESSES


class FakeEvent:
    """A CUDA event of a fake GPU, whose clock advances by a millisecond with each event."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: None) -> None:
        FakeEvent.clock += 1
        self.time = FakeEvent.clock

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.time - self.time


def test_collectives_of_gpus_are_timed_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    traffic, gpu = Traffic(), torch.device("cuda", 0)
    for timed, expected in ((False, 0.0), (True, 2.0), (False, 0.0)):
        if timed:
            traffic.start_timing()
        for device in (gpu, torch.device("cpu"), gpu):
            with traffic.counted(3, 5, device):
                pass
        assert traffic.stop_timing() == expected
    assert (traffic.bytes, FakeEvent.clock) == (9 * 2 * 2 * 5, 4)


def test_a_group_of_others_is_refused(found: list[dict[str, list[Tensor]]]) -> None:
    assert "expected one that this process belongs to, got one of [2, 3] in process 0" in str(found[0]["error"])
    assert "got one of [0, 1] in process 3" in str(found[3]["error"])


def test_parts_have_equal_lengths() -> None:
    groups = [ContextGroup("", rank, 4) for rank in range(4)]
    x = torch.arange(10).view(2, 5)
    assert [group.part(x, fill=-1).tolist() for group in groups] == [
        [[0, 1], [5, 6]], [[2, 3], [7, 8]], [[4, -1], [9, -1]], [[-1, -1], [-1, -1]]
    ]  # fmt: skip
    assert [group.padding(5).tolist() for group in groups] == [[[False] * 2]] * 2 + [[[False, True]], [[True, True]]]
    assert [group.padding(8) for group in groups] == [None] * 4
    assert groups[3].positions(2).tolist() == [[6, 7]]
    assert groups[1].part(x[..., None], dim=-2).shape == (2, 2, 1)


def test_mistakes_are_named_before_anything_is_sent() -> None:
    group, x, ranks = ContextGroup("", 1, 2), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6)
    documents = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match=r"documents numbered along the whole rows.*ContextGroup\.pack"):
        exchange_keys(group, [x], ranks, KeepRule(3), Packing.of(documents))
    with pytest.raises(ValueError, match=r"documents: expected shape \[2, 5\]"):
        exchange_keys(group, [x[:, :, 1:]], ranks[..., 1:], KeepRule(3), PartPacking(documents, None, documents))
    for rows in ([x[:1]], [x[:, :1]], [x[:, :, 1:]], [x.long()], [x, ranks[0]]):
        with pytest.raises(ValueError, match=r"rows: expected floating \[2, 2, 6, \.\.\.\] on cpu"):
            exchange_keys(group, rows, ranks, KeepRule(3))
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        exchange_window(group, [x], 0)
    with pytest.raises(ValueError, match="ranks: expected floating or int64"):
        exchange_keys(group, [x], ranks.int(), KeepRule(3))


def test_one_process_needs_no_others() -> None:
    case = Case(1, 40, KeepRule(5, 3, 2), documents="any", padding="between")
    check(case, [results(case, ContextGroup("", 0, 1), attended)])


sent: list[int] = []


class _Alone(ContextGroup):
    """Counts the bytes that it sends, and receives its own bytes in place of those of all processes."""

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        sent.append(sum(part.nbytes for part in parts))
        return [part.expand(self.size, *part.shape) for part in parts]


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("length", [64, 512])
def test_what_is_sent_does_not_grow_with_the_sequence(length: int, drift: bool) -> None:
    sent.clear()
    k, v = torch.randn(2, 1, 2, length, 8, dtype=torch.bfloat16)
    bias = torch.randn(1, 2, length, dtype=torch.float64 if drift else torch.float32)
    ranks = torch.arange(length).expand(1, 2, -1) if drift else bias
    extended = exchange_keys(_Alone("", 3, 4), (k, v, bias), ranks, KeepRule(20, 5, 2))
    assert sent == [2 * (20 + 4 + 2) * (4 * 8 + (20 if drift else 12))]
    assert extended.earlier == 26
    assert extended.lifetimes.length == 26 + length
