"""The cache sees the same keys as the full mask, however a sequence is cut into calls."""

import masks
import pytest
import torch
from arrivals import FAR, attend, verify, with_drift
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dma_kernels import DynamicMaskCache, FullCache, KeepRule, Lifetimes, reference_attention
from dma_kernels.decoding import dynamic_cache, full_cache
from dma_kernels.ranks import as_integers

HEAD_DIM, HEADS, KV_HEADS, BATCH = 4, 4, 2, 2
# One position; several; several of which only some are accepted.
CALLS = st.lists(st.tuples(st.sampled_from(["step", "chunk", "verify"]), st.integers(1, 9)), min_size=1, max_size=12)


def make_inputs(length: int, ties: bool) -> dict[str, Tensor]:
    """q, k, v, scores and ranks in float64."""
    shapes = {"q": (BATCH, HEADS, length, HEAD_DIM)} | dict.fromkeys("kv", (BATCH, KV_HEADS, length, HEAD_DIM))
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    ranks = torch.randn(BATCH, KV_HEADS, length, dtype=torch.float64)
    return inputs | {"ranks": ranks.round() if ties else ranks, "scores": ranks.sin()}


def part(inputs: dict[str, Tensor | None], start: int, end: int) -> dict[str, Tensor | None]:
    """A range of positions of all inputs. In documents and padding, positions are the last dimension."""
    dims = {"q": 2, "k": 2, "v": 2}
    return {
        name: None if x is None else x.narrow(dims.get(name, x.ndim - 1), start, end - start)
        for name, x in inputs.items()
    }


def oracle(inputs: dict[str, Tensor | None], window: int, keep_last: int, sinks: int) -> Tensor:
    """The mask, computed with a heap, `[B, G, N, N]`."""
    bits = as_integers(inputs["ranks"]).tolist()

    def row(name: str, b: int) -> list | None:
        return None if inputs[name] is None else inputs[name][b].tolist()

    return torch.stack(
        [
            torch.stack(
                [
                    masks.heap_mask(bits[b][g], window, row("documents", b), row("padding", b), keep_last, sinks)
                    for g in range(KV_HEADS)
                ]
            )
            for b in range(BATCH)
        ]
    )


def sees(cache: DynamicMaskCache, length: int) -> Tensor:
    """Which positions the last query sees, bool `[B, G, N]`. Checks that it sees none of them twice."""
    visible, position = cache.visible(), cache.state.position
    count = torch.zeros(*position.shape[:2], length, dtype=torch.long)
    count.scatter_add_(2, position.clamp(min=0), visible.long())
    assert count.max() <= 1
    return count.bool()


@settings(max_examples=150, deadline=None)
@given(
    calls=CALLS,
    window=st.integers(1, 6),
    keep_last=st.integers(0, 3),
    sinks=st.integers(0, 3),
    ties=st.booleans(),
    documents=st.booleans(),
    padding=st.sampled_from(["none", "left", "between"]),
    few=st.sampled_from([0, 64]),
    drift=st.sampled_from([None, None, "gates", "none", "fast", "mixed"]),
    start=st.sampled_from([0, FAR]),
    seed=st.integers(0, 1000),
)
def test_keeps_the_live_keys(
    calls: list[tuple[str, int]],
    window: int,
    keep_last: int,
    sinks: int,
    ties: bool,
    documents: bool,
    padding: str,
    few: int,
    drift: str | None,
    start: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(sum(1 if kind == "step" else size for kind, size in calls), ties)
    inputs = inputs if drift is None else with_drift(inputs, drift, start)
    inputs["documents"] = masks.make_documents(*inputs["ranks"].shape[::2]) + 5 if documents else None
    inputs["padding"] = masks.make_padding(padding, *inputs["ranks"].shape[::2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_cache, "FEW", few)  # more positions than that go through the attention of segments
        check_calls(calls, inputs, window, keep_last, sinks)


def whole(inputs: dict[str, Tensor | None], mask: Tensor) -> Tensor:
    """Attention over a dense mask. The first query's drift is subtracted from all biases, which changes no output."""
    first = 0 if inputs.get("query_bias") is None else inputs["query_bias"][..., :1]
    return reference_attention(inputs["q"], inputs["k"], inputs["v"], inputs["scores"] + first, mask)


def check_calls(
    calls: list[tuple[str, int]], inputs: dict[str, Tensor | None], window: int, keep_last: int, sinks: int
) -> None:
    """Cut a sequence into calls, and check that each call sees what one pass over the whole sequence sees."""
    sizes, length = [1 if kind == "step" else size for kind, size in calls], inputs["ranks"].shape[-1]
    mask = oracle(inputs, window, keep_last, sinks)
    expected = whole(inputs, mask)
    cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, KeepRule(window, keep_last, sinks), dtype=torch.float64)
    start = 0
    for (kind, _), size in zip(calls, sizes, strict=True):
        if kind == "verify":  # wrong guesses first, then the right ones, of which the first is accepted
            before = {name: x.clone() for name, x in cache.state_dict().items()}
            guesses = make_inputs(3, ties=True)
            verify(cache, **guesses if "query_bias" not in inputs else with_drift(guesses, "fast"))
            assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())
            out = verify(cache, **part(inputs, start, start + size))
            assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())
            torch.testing.assert_close(out, expected[:, :, start : start + size])
            cache.commit(torch.tensor([1, 1]))
            if size > 1:
                out = attend(cache, **part(inputs, start + 1, start + size))
                torch.testing.assert_close(out, expected[:, :, start + 1 : start + size])
        else:
            out = attend(cache, **part(inputs, start, start + size))
            torch.testing.assert_close(out, expected[:, :, start : start + size])
        start += size
        assert torch.equal(sees(cache, length), mask[:, :, start - 1])
        assert (cache.state.ranked.sum(-1) <= window + keep_last).all()


def test_rows_may_accept_different_numbers() -> None:
    inputs = make_inputs(12, ties=False)
    cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, KeepRule(3, 1, 1), dtype=torch.float64)
    attend(cache, **part(inputs, 0, 5))
    before = {name: x.clone() for name, x in cache.state_dict().items()}
    verify(cache, **part(inputs, 5, 9))
    cache.commit(torch.tensor([0, 3]))
    for name, x in cache.state_dict().items():
        if name != "sizes":
            assert torch.equal(x[0], before[name][0])  # the same bits, in the same slots
    assert cache.length.tolist() == [5, 8]
    rows = [{n: x[:, :, s:e] if n in "qkv" else x[..., s:e] for n, x in inputs.items()} for s, e in ((5, 9), (8, 12))]
    mixed = {name: torch.stack([rows[0][name][0], rows[1][name][1]]) for name in inputs}
    out = attend(cache, **mixed)
    mask = oracle(inputs | {"documents": None, "padding": None}, 3, 1, 1)
    expected = reference_attention(*(inputs[name] for name in ("q", "k", "v", "scores")), mask)
    torch.testing.assert_close(out[0], expected[0, :, 5:9])
    torch.testing.assert_close(out[1], expected[1, :, 8:12])


def test_select_reorders_and_repeats_rows() -> None:
    inputs = make_inputs(20, ties=True)
    rows = torch.tensor([1, 0, 1])
    for cache in (
        DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 4, dtype=torch.float64),
        FullCache(BATCH, 4),
    ):
        attend(cache, **part(inputs, 0, 9))
        cache.select(rows)
        chosen = {name: x[rows] for name, x in inputs.items()}
        outs = [attend(cache, **part(chosen, t, t + 1)) for t in range(9, 20)]
        mask = Lifetimes.top_w(chosen["ranks"], 4).to_dense()
        expected = reference_attention(*(chosen[name] for name in ("q", "k", "v", "scores")), mask)
        torch.testing.assert_close(torch.cat(outs, dim=2), expected[:, :, 9:])


@pytest.mark.parametrize("way", ["full", "guessed"])
def test_what_was_given_may_be_written_over(way: str) -> None:
    inputs = make_inputs(20, ties=False)
    documents = torch.zeros(BATCH, 20, dtype=torch.int64)
    mask = Lifetimes.top_w(inputs["ranks"], 4, documents=documents).to_dense()
    expected = reference_attention(*(inputs[name] for name in ("q", "k", "v", "scores")), mask)
    inputs |= {"documents": documents}
    given = {name: x.clone() for name, x in part(inputs, 0, 9).items()}
    if way == "full":
        cache = FullCache(BATCH, 4)
        attend(cache, **given)
    else:
        cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 4, dtype=torch.float64)
        verify(cache, **given)
    for name, x in given.items():
        if way == "full" or name == "documents":  # keys must stay until they are committed
            x.fill_(7)
    if way == "guessed":
        cache.commit(torch.full((BATCH,), 9))
    out = attend(cache, **part(inputs, 9, 20))
    torch.testing.assert_close(out, expected[:, :, 9:])


def test_the_full_cache_takes_another_window_at_any_time() -> None:
    inputs = make_inputs(30, ties=False)
    cache = FullCache(BATCH, KeepRule(8, 1, 1))
    for start, end, window in ((0, 10, 8), (10, 11, 3), (11, 20, 12), (20, 30, 1)):
        cache.keep = KeepRule(window, 1, 1)
        out = attend(cache, **part(inputs, start, end))
        mask = Lifetimes.top_w(inputs["ranks"], window, keep_last=1, sinks=1).to_dense()
        expected = reference_attention(*(inputs[name] for name in ("q", "k", "v", "scores")), mask)
        torch.testing.assert_close(out, expected[:, :, start:end])


def test_state_can_be_saved_and_loaded() -> None:
    inputs = make_inputs(30, ties=True)
    caches = [DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, KeepRule(4, 2, 1), dtype=torch.float64) for _ in range(2)]
    attend(caches[0], **part(inputs, 0, 17))
    caches[1].load_state_dict(caches[0].state_dict())
    outs = [torch.cat([attend(cache, **part(inputs, t, t + 1)) for t in range(17, 30)], dim=2) for cache in caches]
    assert torch.equal(*outs)
    for sizes in ((5, 2, 1), (5, 1, 1)):  # the latter of as many slots
        other = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, KeepRule(*sizes), dtype=torch.float64)
        with pytest.raises(ValueError, match="expected the state of a cache with"):
            other.load_state_dict(caches[0].state_dict())


def test_a_nan_shows_as_long_as_its_key_lives() -> None:
    inputs = make_inputs(12, ties=False)
    inputs["v"][0, 0, 2] = torch.nan
    inputs["ranks"][0, 0, 2] = -9.0  # and dies as soon as two better ones are there
    cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 2, dtype=torch.float64)
    outs = torch.cat([attend(cache, **part(inputs, t, t + 1)) for t in range(12)], dim=2)
    mask = Lifetimes.top_w(inputs["ranks"], 2).to_dense()
    broken = mask[0, 0, :, 2]
    assert torch.equal(outs[0, 0].isnan().any(-1), broken)
    assert torch.isfinite(outs[:, :, 5:]).all()


def test_memory_does_not_grow() -> None:
    inputs = make_inputs(200, ties=False)
    cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, KeepRule(8, 2, 1), dtype=torch.float64)
    shapes = {name: x.shape for name, x in cache.state_dict().items()}
    for start in range(0, 200, 40):
        attend(cache, **part(inputs, start, start + 40))
        assert {name: x.shape for name, x in cache.state_dict().items()} == shapes
    assert cache.capacity == 11


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="keep_window_size"):
        DynamicMaskCache(1, 1, 4, 0)
    with pytest.raises(ValueError, match="keep_window_size"):
        FullCache(1, 0)
    cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 4)
    inputs = make_inputs(3, ties=False)
    with pytest.raises(ValueError, match=r"k: expected torch\.float32 as the cache, got torch\.float64"):
        attend(cache, **inputs)
    inputs = {name: x.float() for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"ranks: expected floating or int64 \[2, 2, 3\]"):
        attend(cache, **inputs | {"ranks": inputs["ranks"][:, :1]})
    with pytest.raises(ValueError, match="ranks: expected floating or int64"):
        attend(cache, **inputs | {"ranks": inputs["ranks"].int()})
    with pytest.raises(ValueError, match=r"key_bias: expected float32 or float64 .* got torch.float16"):
        attend(cache, **inputs | {"scores": inputs["scores"].half()})
    with pytest.raises(ValueError, match=r"query_bias: expected float32 or float64 \[2, 2, 3\] on cpu"):
        attend(cache, **inputs, query_bias=inputs["scores"][:, :1])
    for wrong in (inputs["q"][:, :, :2], inputs["q"][:1], inputs["q"].double(), inputs["q"][:, :3]):
        with pytest.raises(ValueError, match=r"q|query heads"):
            attend(cache, **inputs | {"q": wrong})
    with pytest.raises(ValueError, match=r"k: expected \[2, 2, n, 4\]"):
        attend(cache, **{name: x[:1] for name, x in inputs.items()})
    with pytest.raises(ValueError, match="k: expected at least one"):
        attend(cache, **part(inputs, 0, 0))
    with pytest.raises(ValueError, match="padding: expected bool"):
        attend(cache, **inputs, padding=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected a call of verify before"):
        cache.commit(torch.tensor([1, 1]))
    verify(cache, **inputs)
    for count in (1, torch.tensor([1]), torch.tensor([1.0, 1.0])):
        with pytest.raises(ValueError, match="count: expected an int64 tensor"):
            cache.commit(count)
    with pytest.raises(ValueError, match="ranks"):
        verify(cache, **inputs | {"ranks": inputs["ranks"][:, :1]})
    verify(cache, **inputs)
    attend(cache, **inputs)  # what was not committed is gone
    with pytest.raises(ValueError, match="expected a call of verify before"):
        cache.commit(torch.tensor([1, 1]))
    assert cache.length.tolist() == [3, 3]
    full = FullCache(BATCH, 4)
    attend(full, **inputs)
    with pytest.raises(ValueError, match="padding: expected bool"):
        attend(full, **inputs, padding=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="k: expected batch 2 and keys like"):
        attend(full, **{name: x.double() for name, x in inputs.items()})
    assert attend(full, **inputs).shape == inputs["q"].shape
    assert full.length.tolist() == [6, 6]


def test_numbers_of_accepted_positions_are_clamped() -> None:
    inputs = make_inputs(8, ties=False)
    cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 3, dtype=torch.float64)
    attend(cache, **part(inputs, 0, 4))
    verify(cache, **part(inputs, 4, 8))
    cache.commit(torch.tensor([-1, 9]))
    assert cache.length.tolist() == [4, 8]


@pytest.mark.parametrize("few", [0, 64])
def test_a_document_goes_on_behind_padding(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids at padded positions mean nothing, in both caches and in every integer type."""
    monkeypatch.setattr(dynamic_cache, "FEW", few)
    monkeypatch.setattr(full_cache, "FEW", few)
    inputs = make_inputs(12, ties=False)
    documents = torch.tensor([[5, 5, 5, 9]] * BATCH, dtype=torch.uint8)
    padding = torch.tensor([[False, False, False, True]] * BATCH)
    outs = []
    for cache in (
        DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 3, dtype=torch.float64),
        FullCache(BATCH, 3),
    ):
        attend(cache, **part(inputs, 0, 4), documents=documents, padding=padding)
        out = [attend(cache, **part(inputs, 4, 8)), attend(cache, **part(inputs, 8, 9))]
        out.append(attend(cache, **part(inputs, 9, 12), documents=torch.full((BATCH, 3), 5 + 256)))
        outs.append(torch.cat(out, dim=2))
    torch.testing.assert_close(*outs)
    expected = Lifetimes.top_w(
        inputs["ranks"],
        3,
        documents=torch.tensor([[5] * 9 + [261] * 3] * BATCH),
        padding=torch.arange(12).expand(BATCH, -1) == 3,
    ).to_dense()
    expected = reference_attention(*(inputs[name] for name in ("q", "k", "v", "scores")), expected)
    torch.testing.assert_close(outs[0], expected[:, :, 4:])


@pytest.mark.parametrize("cut", [[12], [5, 4, 1, 1, 1]])
def test_equal_scores_are_no_preference_however_large(cut: list[int]) -> None:
    inputs = make_inputs(12, ties=True)
    inputs |= {"q": torch.zeros_like(inputs["q"]), "scores": torch.full_like(inputs["scores"], 1.7e308)}
    expected = inputs["v"].cumsum(2) / torch.arange(1, 13)[:, None]
    for cache in (FullCache(BATCH, 20), DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 20, dtype=torch.float64)):
        outs, start = [], 0
        for count in cut:
            outs.append(attend(cache, **part(inputs, start, start + count)))
            start += count
        torch.testing.assert_close(torch.cat(outs, dim=2), expected.repeat_interleave(HEADS // KV_HEADS, dim=1))


def test_states_of_before_are_read() -> None:
    """In which last positions that were not among the best were not ranked."""
    inputs = make_inputs(12, ties=False)
    caches = [DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, KeepRule(2, 3), dtype=torch.float64) for _ in range(2)]
    attend(caches[0], **part(inputs, 0, 8))
    state = {name: x.clone() for name, x in caches[0].state_dict().items()}
    state["ranked"] &= state["position"] <= 4
    caches[1].load_state_dict(state)
    expected, found = (attend(cache, **part(inputs, 8, 12)) for cache in caches)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "full"])
@pytest.mark.parametrize("cut", [[130], [65] + [1] * 65, [100, 3, 1, 26]])
def test_far_into_a_text_biases_are_as_exact_as_at_its_beginning(kind: str, cut: list[int]) -> None:
    """In float32, after 80 million nats, where a step of float32 is 8 nats."""
    torch.manual_seed(1)
    inputs, outs = make_inputs(130, ties=False), []
    for start in (0, FAR):
        torch.manual_seed(2)
        drifting = with_drift(inputs, "gates", start)
        narrow = drifting | {name: drifting[name].float() for name in "qkv"}
        cache = (
            DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, KeepRule(9, 2)) if kind == "dynamic" else FullCache(BATCH, 9)
        )
        parts = torch.arange(130).split(cut)
        outs.append(torch.cat([attend(cache, **part(narrow, int(x[0]), int(x[-1]) + 1)) for x in parts], dim=2))
    assert outs[0].dtype == torch.float32
    torch.testing.assert_close(*outs, atol=2e-6, rtol=2e-6)
    rule = {"keep_last": 2} if kind == "dynamic" else {}
    exact = whole(drifting, Lifetimes.top_w(drifting["ranks"], 9, **rule).to_dense())
    torch.testing.assert_close(outs[1].double(), exact, atol=2e-6, rtol=2e-6)


def test_a_cache_goes_on_with_the_kind_of_ranks_and_biases_that_it_began_with() -> None:
    plain = {name: x.float() for name, x in make_inputs(8, ties=False).items()}
    integers = with_drift(plain, "gates")
    caches = [DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 3), FullCache(BATCH, 3)]
    for cache in caches:
        attend(cache, **part(integers, 0, 4))
        with pytest.raises(ValueError, match=r"ranks.*: expected torch.int64"):
            attend(cache, **part(plain, 4, 8))
        attend(cache, **part(integers, 4, 8))
    state = caches[0].state_dict()
    assert (state["rank"].dtype, state["key_bias"].dtype) == (torch.int64, torch.float64)
    for before in (plain, integers):  # what it held before does not matter
        other = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 3)
        attend(other, **part(before, 0, 2))
        other.load_state_dict(state)
        assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
    with pytest.raises(ValueError, match="expected the state of a cache with"):
        other.load_state_dict(state | {"rank": state["rank"].int()})


def test_a_state_with_a_drift_of_before_is_refused_in_words() -> None:
    """Its ranks and biases were rounded sums."""
    plain = {name: x.float() for name, x in make_inputs(8, ties=False).items()}
    cache = DynamicMaskCache(BATCH, KV_HEADS, HEAD_DIM, 3)
    attend(cache, **part(plain, 0, 4))
    state = {name: x.clone() for name, x in cache.state_dict().items()}
    cache.load_state_dict(state)
    with pytest.raises(ValueError, match=r"read the text again.* in which ranks with a drift were floating"):
        attend(cache, **part(with_drift(plain, "gates"), 4, 8))
    attend(cache, **part(plain, 4, 8))  # without a drift, it goes on
