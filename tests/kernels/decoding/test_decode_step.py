"""The kernel of a decoding step leaves the same bits in the cache as the plain step, and has the same output."""

import masks
import pytest
import torch
from arrivals import FAR, arrivals, attend, verify, with_drift
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels import DynamicMaskCache, KeepRule

pytest.importorskip("triton")
from dma_kernels.decoding.kernels import DecodeConfig, _addressable, launch_decode_step

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH, KV_HEADS = 2, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
STEPS = 12 if ON_GPU else 3  # the interpreter takes a tenth of a second for one


def make_inputs(length: int, group: int, head_dim: int, ties: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of `attend`, none of them contiguous."""
    heads = {"q": KV_HEADS * group, "k": KV_HEADS, "v": KV_HEADS}
    inputs = {
        name: torch.randn(BATCH, length, count, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
        for name, count in heads.items()
    }
    ranks = torch.randn(BATCH, length, KV_HEADS, device=DEVICE).transpose(1, 2)
    return inputs | {"ranks": ranks.round() if ties else ranks, "scores": ranks.sin()}


def at(inputs: dict[str, Tensor | None], t: int, end: int | None = None) -> dict[str, Tensor | None]:
    """One position of all inputs, or several."""
    end = t + 1 if end is None else end
    return {name: None if x is None else x[:, :, t:end] if x.ndim > 2 else x[:, t:end] for name, x in inputs.items()}


def caches(head_dim: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> list[DynamicMaskCache]:
    """Two caches: one that steps in plain PyTorch, and one that steps with the kernel."""
    return [
        DynamicMaskCache(BATCH, KV_HEADS, head_dim, KeepRule(*sizes), dtype=dtype, device=DEVICE, backend=backend)
        for backend in ("torch", "triton")
    ]


def check_equal(plain: DynamicMaskCache, fused: DynamicMaskCache) -> None:
    """Check for the same bits in all tensors, and that no new keys are pending."""
    state = fused.state_dict()
    for name, x in plain.state_dict().items():
        assert torch.equal(x.nan_to_num(nan=7.0), state[name].nan_to_num(nan=7.0)), name
    assert not fused.state.arrivals.any()


def check_steps(
    inputs: dict[str, Tensor | None], prefill: int, sizes: tuple[int, int, int], tolerance: float = 1e-5
) -> None:
    """Read some positions at once and the others one by one."""
    plain, fused = caches(inputs["q"].shape[-1], sizes, inputs["q"].dtype)
    for cache in (plain, fused):
        attend(cache, **at(inputs, 0, prefill))
    for t in range(prefill, inputs["q"].shape[2]):
        expected = attend(plain, **at(inputs, t))
        with poisoned_buffers():
            out = attend(fused, **at(inputs, t))
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
        check_equal(plain, fused)


@settings(max_examples=60 if ON_GPU else 15, deadline=None)
@given(
    window=st.sampled_from([1, 2, 15, 16, 33, 64, 70]),
    keep_last=st.integers(0, 3),
    sinks=st.integers(0, 3),
    group=st.sampled_from([1, 3, 4]),
    ties=st.booleans(),
    documents=st.booleans(),
    padding=st.sampled_from(["none", "left", "between"]),
    prefill=st.integers(1, 80),
    drift=st.sampled_from([None, None, "gates", "fast", "none", "mixed"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_step(
    window: int,
    keep_last: int,
    sinks: int,
    group: int,
    ties: bool,
    documents: bool,
    padding: str,
    prefill: int,
    drift: str | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    length = prefill + STEPS
    inputs = make_inputs(length, group, 16, ties, torch.float32)
    inputs = inputs if drift is None else with_drift(inputs, drift, FAR)
    inputs["documents"] = masks.make_documents(BATCH, length).to(DEVICE) if documents else None
    pads = masks.make_padding(padding, BATCH, length)
    inputs["padding"] = None if pads is None else pads.to(DEVICE)
    check_steps(inputs, prefill, (window, keep_last, sinks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 20, 128, 256] if ON_GPU else [2, 20])
@pytest.mark.parametrize("group", [1, 7, 17])
def test_head_dims_groups_and_dtypes(group: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(130 + STEPS, group, head_dim, False, dtype)
    check_steps(inputs, 130, (100, 1, 1), max(1e-5, 4 * torch.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("window", "drift"),
    [(1023, "none"), (2100, None)] + [(1023, None), (1024, "gates"), (2100, "gates")] * ON_GPU,
)
def test_more_slots_than_are_looked_at_at_once(window: int, drift: str | None) -> None:
    inputs, steps = make_inputs(window + 40, 2, 16, True, torch.float32), 4 if ON_GPU else 2
    inputs = inputs if drift is None else with_drift(inputs, drift, FAR)
    check_steps(inputs, window + 40 - steps, (window, 2, 1))
    check_steps(at(inputs, 0, 40), 40 - steps, (window, 2, 1))  # nearly empty


@pytest.mark.parametrize(
    ("config", "drift"), [((16, 16, 1, 1), "gates"), ((16, 48, 4, 2), None), ((32, 4096, 8, 3), "gates")]
)
def test_the_configuration_changes_nothing(config: tuple[int, int, int, int], drift: str | None) -> None:
    inputs = make_inputs(220, 4, 16, True, torch.float32)
    inputs = inputs if drift is None else with_drift(inputs, drift, FAR)
    plain, fused = caches(16, (190, 1, 1), torch.float32)
    for cache in (plain, fused):
        attend(cache, **at(inputs, 0, 219))
    expected = attend(plain, **at(inputs, 219))
    q, new = inputs["q"][:, :, 219:], arrivals(**{x: y for x, y in at(inputs, 219).items() if x != "q"})
    options = {"real": None, "keep": KeepRule(190, 1, 1), "config": DecodeConfig(*config)}
    out = launch_decode_step(q, new, fused.state, **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    check_equal(plain, fused)


def test_a_nan_is_kept_and_ends_with_its_document() -> None:
    inputs = make_inputs(30, 2, 16, False, torch.float32)
    inputs["ranks"][:, 0, 12] = torch.nan
    inputs["v"][:, 0, 12] = torch.nan
    documents = torch.zeros(BATCH, 30, dtype=torch.int64, device=DEVICE)
    documents[:, 24:] = 1
    plain, fused = caches(16, (4, 0, 0), torch.float32)
    outs = []
    for t in range(30):
        outs.append([attend(cache, **at(inputs, t), documents=documents[:, t : t + 1]) for cache in (plain, fused)])
        torch.testing.assert_close(*outs[-1], equal_nan=True)
        check_equal(plain, fused)
    assert all(outs[t][1][:, :2].isnan().all() == (12 <= t < 24) for t in range(30))
    assert all(out[:, 2:].isfinite().all() for _, out in outs)


@pytest.mark.parametrize("sizes", [(4, 0, 0), (4, 2, 1)])
def test_the_largest_and_the_least_integers_are_ranks_like_others(sizes: tuple[int, int, int]) -> None:
    """Those of slots that hold no key, or of keys that do not compete, are never taken for them."""
    inputs = with_drift(make_inputs(24, 2, 16, False, torch.float32), "gates")
    ends = torch.tensor([-(2**63), 2**63 - 1, 0], device=DEVICE)
    inputs["ranks"] = ends[torch.randint(3, inputs["ranks"].shape, device=DEVICE)]
    check_steps(inputs, 1, sizes)


@pytest.mark.parametrize("sizes", [(4, 2, 0), (8, 8, 0), (4, 0, 2), (3, 2, 2)])
def test_an_infinity_that_has_died_is_not_seen(sizes: tuple[int, int, int]) -> None:
    inputs = make_inputs(30, 2, 16, False, torch.float32)
    inputs["v"][:, :, 5, 0], inputs["ranks"][:, :, 5] = torch.inf, -9.0
    plain, fused = caches(16, sizes, torch.float32)
    for t in range(30):
        outs = [attend(cache, **at(inputs, t)) for cache in (plain, fused)]
        if t > 5 + sizes[1] + sizes[0]:
            torch.testing.assert_close(*outs)
            assert outs[1].isfinite().all()


def test_heads_that_lie_far_apart_are_copied() -> None:
    """Offsets are computed in 32 bits."""
    x = _addressable(torch.empty(1, device="meta").as_strided((1, 4, 1, 16), (2**33, 2**30, 16, 1)))
    assert x.stride(1) == 16
    near = make_inputs(6, 2, 16, False, torch.float32)["q"][:, :, 5:6]
    assert _addressable(near).data_ptr() == near.data_ptr()


@pytest.mark.parametrize("drift", [None, "mixed"])
def test_select_and_chunks_between_steps(drift: str | None) -> None:
    inputs = make_inputs(40, 2, 16, True, torch.float32)
    inputs = inputs if drift is None else with_drift(inputs, drift, FAR)
    plain, fused = caches(16, (6, 1, 1), torch.float32)
    rows = torch.tensor([1, 0], device=DEVICE)
    for cache in (plain, fused):
        attend(cache, **at(inputs, 0, 9))
        attend(cache, **at(inputs, 9))
        cache.select(rows)
        verify(cache, **at(inputs, 10, 14))
        cache.commit(torch.tensor([2, 3], device=DEVICE))
        attend(cache, **at(inputs, 14))
    check_equal(plain, fused)
    with pytest.raises(ValueError, match="expected the state"):
        fused.load_state_dict({})


def test_what_the_kernel_cannot_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend: expected one of"):
        DynamicMaskCache(1, 1, 16, 4, backend="flex")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        DynamicMaskCache(1, 1, 16, 4, dtype=torch.float64, device=DEVICE, backend="triton")
    with pytest.raises(ValueError, match="head dims up to 256"):
        DynamicMaskCache(1, 1, 300, 4, device=DEVICE, backend="triton")


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_captured_step_and_a_captured_verification_go_on() -> None:
    """Replays change the cache as calls do: steps by the kernel, and guesses verified and committed."""
    inputs = make_inputs(60, 4, 64, True, torch.bfloat16)
    plain, fused = caches(64, (16, 1, 1), torch.bfloat16)
    step, several = ({name: x.clone() for name, x in at(inputs, 0, n).items()} for n in (1, 3))
    accepted = torch.full((BATCH,), 2, device=DEVICE)
    for cache in (plain, fused):
        attend(cache, **at(inputs, 0, 20))
    saved = {name: x.clone() for name, x in fused.state_dict().items()}

    def guess() -> Tensor:
        out = verify(fused, **several)
        fused.commit(accepted)
        return out

    graphs, outs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    for graph, call in zip(graphs, (lambda: attend(fused, **step), guess), strict=True):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            outs.append(call())
    fused.load_state_dict(saved)
    t = 20
    for i in range(12):
        which = i % 2
        size = (1, 3)[which]
        for name, x in at(inputs, t, t + size).items():
            (step, several)[which][name].copy_(x)
        graphs[which].replay()
        if which:
            expected = verify(plain, **at(inputs, t, t + size))
            plain.commit(accepted)
        else:
            expected = attend(plain, **at(inputs, t))
        torch.testing.assert_close(outs[which], expected, atol=2e-2, rtol=2e-2)
        check_equal(plain, fused)
        t += (1, 2)[which]


@pytest.mark.parametrize("score", [torch.finfo(torch.float32).min, -3e38, 3e38])
def test_equal_scores_are_no_preference_however_large(score: float) -> None:
    inputs = make_inputs(12, 2, 16, False, torch.float32)
    inputs |= {"q": torch.zeros_like(inputs["q"]), "scores": torch.full_like(inputs["scores"], score)}
    plain, fused = caches(16, (20, 0, 0), torch.float32)
    for cache in (plain, fused):
        attend(cache, **at(inputs, 0, 8))
        for t in range(8, 12):
            mean = inputs["v"][:, :, : t + 1].mean(2, keepdim=True).repeat_interleave(2, dim=1)
            torch.testing.assert_close(attend(cache, **at(inputs, t)), mean)
    check_equal(plain, fused)


def test_an_infinite_score_shows() -> None:
    inputs = make_inputs(9, 2, 16, False, torch.float32)
    inputs["scores"] = inputs["scores"].clone()
    inputs["scores"][:, :, 8] = torch.inf
    for cache in caches(16, (20, 0, 0), torch.float32):
        attend(cache, **at(inputs, 0, 8))
        assert attend(cache, **at(inputs, 8)).isnan().all()
