"""Ranks with a drift equal the integers that Python computes, and select the same keys."""

import hashlib

import drifting
import masks
import pytest
import torch

from dma_kernels import Lifetimes, reference_mask
from dma_kernels.fixed_point import (
    drift_sums,
    drifts,
    drifts_reference,
    fixed_point_ranks,
    fixed_point_ranks_reference,
    ranks_of_steps,
    suffix_sums,
    suffix_sums_reference,
)
from dma_kernels.ranks import ordered_bits
from dma_kernels.selection.ops import deaths_by_rank
from dma_kernels.units import LARGEST, NAN_RANK, in_units

SHAPE = (2, 2, 63)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4, 1e9])
def test_units_are_rounded_half_to_even(dtype: torch.dtype, scale: float) -> None:
    nats = torch.cat([torch.randn(500, dtype=torch.float64) * scale, torch.arange(-9, 9) * 2.0**-33]).to(dtype)
    nats = nats[nats.isfinite()]
    assert in_units(nats).tolist() == [drifting.units(x) for x in nats.tolist()]


@pytest.mark.parametrize("kind", drifting.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_are_those_of_integers(kind: str, dtype: torch.dtype) -> None:
    content, steps = drifting.draw(kind, SHAPE, dtype)
    padding = masks.make_padding("between", 2, 63)
    for pads in (None, padding):
        found = ranks_of_steps(content, steps, pads)
        for b in range(2):
            row = None if pads is None else pads[b].tolist()
            for g in range(2):
                expected = drifting.integer_ranks(content[b, g].tolist(), steps[b, g].tolist(), row)
                assert found[b, g].tolist() == expected


@pytest.mark.parametrize("kind", drifting.KINDS)
@pytest.mark.parametrize("start", [0, 10_000_000 * 8 << 32, LARGEST - (1 << 33), LARGEST])
def test_sums_do_not_depend_on_how_they_are_cut(kind: str, start: int) -> None:
    steps = drifting.draw(kind, SHAPE)[1]
    total, whole = torch.full((2, 2), start), drift_sums(steps, torch.full((2, 2), start))
    assert whole[1, 0].tolist() == drifting.sums(steps[1, 0].tolist(), start=start)
    for part in steps.split([1, 1, 7, 30, 24], dim=-1):
        sums = drift_sums(part, total)
        assert torch.equal(sums, whole[..., : sums.shape[-1]])
        whole, total = whole[..., sums.shape[-1] :], sums[..., -1]


def test_the_operation_is_what_torch_expects() -> None:
    for start in (None, torch.ones(2, 2, dtype=torch.int64)):
        torch.library.opcheck(drifts, (drifting.draw("mixed", SHAPE)[1], start))
    torch.library.opcheck(suffix_sums, (torch.randn(SHAPE),))
    torch.library.opcheck(fixed_point_ranks, drifting.draw("mixed", SHAPE))


@pytest.mark.parametrize("case", masks.CASES, ids=str)
@pytest.mark.parametrize("kind", drifting.KINDS)
def test_a_drift_selects_by_integers(kind: str, case: masks.Case) -> None:
    content, steps = drifting.draw(kind, SHAPE)
    arguments = case.arguments(2, 63)
    for window in (1, 7, 62, 70):
        dense = Lifetimes.top_w(content, window, drift=steps, **arguments).to_dense()
        assert torch.equal(dense, reference_mask(content, window, drift=steps, **arguments))
        for b in range(2):
            row = {k: x[b].tolist() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
            ranks = drifting.integer_ranks(content[b, 1].tolist(), steps[b, 1].tolist(), row["padding"])
            assert torch.equal(dense[b, 1], masks.heap_mask(ranks, window, **row))


@pytest.mark.parametrize("case", masks.CASES, ids=str)
def test_any_integers_are_ranks(case: masks.Case) -> None:
    """The least and the largest, too: neither documents nor padding take a bit of them."""
    extremes = torch.tensor([-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 2, 2**63 - 1])
    ranks, arguments = extremes[torch.randint(7, (2, 2, 111))], case.arguments(2, 111)
    dense = Lifetimes.top_w(ranks, 9, **arguments).to_dense()
    assert torch.equal(dense, reference_mask(ranks, 9, **arguments))
    for b in range(2):
        row = {k: x[b].tolist() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
        assert torch.equal(dense[b, 0], masks.heap_mask(ranks[b, 0].tolist(), 9, **row))


def test_keys_keep_their_order_far_into_a_text() -> None:
    """After 80 million nats, where float32 has steps of 8."""
    content, steps = drifting.draw("gates", SHAPE)
    near = Lifetimes.top_w(content, 9, drift=steps)
    steps[..., 0] = 8e7
    far = Lifetimes.top_w(content, 9, drift=steps)
    assert torch.equal(far.death, near.death)
    before = (content + steps.cumsum(-1)).float()
    assert not torch.equal(Lifetimes.top_w(before, 9).death, near.death)


def test_padding_does_not_drift() -> None:
    content, steps = drifting.draw("gates", (1, 2, 63))
    padding = masks.make_padding("between", 2, 63)[:1]
    real = ~padding[0]
    dense = Lifetimes.top_w(content, 5, drift=steps, padding=padding).to_dense()[..., real, :][..., real]
    alone = Lifetimes.top_w(content[..., real], 5, drift=steps[..., real])
    assert torch.equal(dense, alone.to_dense())


def test_documents_do_not_see_what_drifted_before() -> None:
    content, steps = drifting.draw("mixed", (1, 2, 63))
    documents = (torch.arange(63) >= 40).long()[None]
    dense = Lifetimes.top_w(content, 5, drift=steps, documents=documents, sinks=1).to_dense()
    alone = Lifetimes.top_w(content[..., 40:], 5, drift=steps[..., 40:], sinks=1)
    assert torch.equal(dense[..., 40:, 40:], alone.to_dense())


def test_steps_that_are_too_small_leave_a_sliding_window() -> None:
    steps = torch.full((1, 1, 50), 2.0**-34)
    found = Lifetimes.top_w(torch.zeros(1, 1, 50), 7, drift=steps)
    assert torch.equal(found.death, Lifetimes.sliding_window(50, 7).death)


def test_floating_ranks_are_compared_as_ever() -> None:
    """Deaths that were written down before ranks could be integers."""
    ranks = torch.randn(2, 3, 257, generator=torch.Generator().manual_seed(7)).mul(8).round() / 8
    ranks[0, 0, 5], ranks[0, 1, 100:120], ranks[1, 2, 9] = torch.nan, -torch.inf, torch.inf
    ranks[1, 1] += torch.arange(257) * 2.0**-20
    documents, padding = (torch.arange(257) // 100).expand(2, -1), (torch.arange(257) % 11 == 4).expand(2, -1)
    deaths = [
        Lifetimes.top_w(ranks, 17, **arguments).death
        for arguments in ({}, {"documents": documents, "keep_last": 3, "sinks": 2}, {"padding": padding})
    ]
    digest = hashlib.sha256(torch.stack(deaths).numpy().tobytes()).hexdigest()
    assert digest == "fa6b3f82d27ac71ab02d63db92759d4c114eb8c50e7378651096aa8e7bc75c8e"
    integers = ordered_bits(ranks).long()
    assert torch.equal(deaths_by_rank(integers, None, None, 17), deaths_by_rank(ranks, None, None, 17))


def test_a_drift_compiles_to_one_graph() -> None:
    content, steps = drifting.draw("special", SHAPE)

    def death(content: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return Lifetimes.top_w(content, 9, drift=steps, keep_last=2).death

    compiled = torch.compile(death, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(content, steps), death(content, steps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drift": torch.zeros(2, 2, 8)}, r"drift: expected floating \[2, 3, 8\] on cpu.* torch.float32 \[2, 2, 8\]"),
        ({"drift": torch.zeros(2, 3, 8, dtype=torch.long)}, "drift: expected floating .* a step in nats for each key"),
        ({"drift": torch.zeros(2, 3, 8, device="meta")}, "drift: expected floating .* on cpu"),
        ({"drift": torch.full((2, 3, 8), -0.5)}, r"drift: expected steps of at least 0 nats, got -0\.5; clamp them"),
        ({"ranks": torch.zeros(2, 3, 8, dtype=torch.long)}, "ranks: expected a floating dtype, in nats, when"),
    ],
)
def test_bad_drift(arguments: dict[str, object], message: str) -> None:
    arguments = {"ranks": torch.zeros(2, 3, 8), "keep_window_size": 4, "drift": torch.ones(2, 3, 8)} | arguments
    for select in (Lifetimes.top_w, reference_mask):
        with pytest.raises(ValueError, match=message):
            select(**arguments)


def test_infinite_contents_end_at_the_bound(device: str) -> None:
    module = pytest.importorskip("dma_kernels.fixed_point_kernels")
    content = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1e30, -1e30, -0.0, 2.0**-33, -(2.0**-33), 3 * 2.0**-33]])
    expected = [LARGEST, -LARGEST, NAN_RANK, LARGEST, -LARGEST, 0, 0, 0, 2]
    for ranks_of in (fixed_point_ranks_reference, module.launch_ranks):
        assert ranks_of(content.to(device), torch.zeros_like(content, device=device)).tolist() == [expected]


def test_a_nan_content_is_kept_and_a_nan_step_is_none() -> None:
    content, steps = torch.zeros(1, 1, 40), torch.full((1, 1, 40), 8.0)
    content[..., 4], steps[..., 9] = torch.nan, torch.nan
    assert Lifetimes.top_w(content, 2, drift=steps).death[0, 0, 4] == 40
    ranks = ranks_of_steps(content, steps)[0, 0]
    assert ranks[4] == NAN_RANK
    assert ranks[9] == ranks[8]


@pytest.mark.parametrize("kind", drifting.KINDS)
@pytest.mark.parametrize("length", [0, 1, 16, 40])
def test_kernels_of_sums(kind: str, length: int, device: str) -> None:
    module = pytest.importorskip("dma_kernels.fixed_point_kernels")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        steps = drifting.draw(kind, (2, length, 3), dtype)[1].mT
        start = torch.tensor([[0, 1, LARGEST], [LARGEST - (5 << 32), 1 << 60, 12345]])
        for given in (None, start):
            found = module.launch_drifts(steps.to(device), None if given is None else given.to(device), block=16)
            for x, y in zip(found, drifts_reference(steps, given), strict=True):
                torch.testing.assert_close(x.cpu(), y, rtol=0, atol=0, equal_nan=True)
        content = drifting.draw(kind, (2, length, 3), dtype)[0].mT
        ranks = module.launch_ranks(content.to(device), steps.to(device), block=16).cpu()
        assert torch.equal(ranks, fixed_point_ranks_reference(content, steps))
        x = torch.randn(2, length, 3, dtype=dtype).mT
        found = module.launch_suffix_sums(x.to(device), block=16).cpu()
        torch.testing.assert_close(found, suffix_sums_reference(x), rtol=1e-12, atol=1e-12)


def test_gradients_of_steps() -> None:
    steps = torch.rand(2, 3, 20, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 20, dtype=torch.float64)
    for given in (steps, steps.float()):  # sums are not of the given numbers, but of these in whole units
        (found,) = torch.autograd.grad((drifts(given)[1] * weight).sum(), steps)
        torch.testing.assert_close(found, weight.flip(-1).cumsum(-1).flip(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_captures_a_selection_with_a_drift() -> None:
    content, steps = (x.cuda() for x in drifting.draw("gates", (2, 2, 3000)))
    steps[..., 1000] = 0.0
    expected = Lifetimes.top_w(content, 100, drift=steps).death  # compiles the kernels, too
    steps[..., 1000] = -1.0  # cannot be checked while the graph is captured, and counts as 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = Lifetimes.top_w(content, 100, drift=steps).death
    graph.replay()
    assert torch.equal(found, expected)
