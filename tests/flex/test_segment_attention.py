"""The FlexAttention backend equals the float64 definition: the output on all devices, and every gradient on a GPU."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact_as_plain
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, flex_attention
from torch.utils.checkpoint import checkpoint

from dma_flex import (
    FlexPlan,
    Lifetimes,
    block_mask,
    flex_segment_attention,
    key_bias_score_mod,
)
from dma_flex import segment_attention as module
from dma_kernels import segment_attention
from dma_kernels.reference import masked_average, masked_logsumexp

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
WINDOW = 256
# Compiling takes tens of seconds per shape on a CPU: there, every value once.
CASES = list(itertools.product([1025, 4096, 8191], [1, 4], [64, 128], [torch.float32, torch.bfloat16]))
ON_CPU = [(1025, 4, 64, torch.float32), (1536, 1, 128, torch.bfloat16)]


def make_inputs(length: int, group: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and ranks; four KV heads on a GPU, one on a CPU."""
    kv_heads = 4 // group if device == "cuda" else 1
    q, grad = torch.randn(2, 1, kv_heads * group, length, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, 1, kv_heads, length, head_dim, device=device).to(dtype)
    ranks = torch.randn(1, kv_heads, length, device=device) / 2
    return [q, k, v, ranks, grad]


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("length", "group", "head_dim", "dtype"), CASES if ON_GPU else ON_CPU)
def test_equals_the_definition(
    length: int, group: int, head_dim: int, dtype: torch.dtype, documents: bool, device: str
) -> None:
    *inputs, grad = make_inputs(length, group, head_dim, dtype, device)
    ids = (torch.rand(1, length, device=device) < 3 / length).cumsum(-1) if documents else None
    mask = Lifetimes.top_w(inputs[3], WINDOW, documents=ids)
    assert_as_exact_as_plain(flex_segment_attention, [*inputs[:3], inputs[3].exp()], mask, grad, trained=ON_GPU)


@needs_gpu
@pytest.mark.parametrize("head_dim", [16, 18, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_head_dims_and_float16(head_dim: int, dtype: torch.dtype) -> None:
    *inputs, grad = make_inputs(700, 2, head_dim, dtype, "cuda")
    mask = Lifetimes.top_w(inputs[3], 100, keep_last=3, sinks=2)
    assert_as_exact_as_plain(flex_segment_attention, [*inputs[:3], inputs[3].exp()], mask, grad, trained=ON_GPU)


def plain_flex_attention(q: Tensor, k: Tensor, v: Tensor, score_mod, block_mask, scale: float, **options: object):
    """What FlexAttention computes, but without kernels, so that q gets a gradient on a CPU too."""
    heads, keys = q.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    b, h, t, j = (torch.arange(n).view(-1, *[1] * (3 - i)) for i, n in enumerate((*q.shape[:3], keys)))
    logits = score_mod(q @ k.mT * scale, b, h, t, j)
    mask = block_mask.mask_mod(b, h, t, j).expand(logits.shape)
    out, lse = masked_average(logits, mask, v), masked_logsumexp(logits, mask)
    return (out, AuxOutput(lse=lse)) if "return_aux" in options else out


@pytest.mark.parametrize("start", [None, 1e6], ids=["scores", "drifting biases"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("length", [1, 63, 300])
def test_gradients_around_flex_attention(
    length: int, group: int, start: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is ours of the backward, in float64 on a CPU, around a plain stand-in for FlexAttention's kernels."""
    monkeypatch.setattr(module, "flex_attention", plain_flex_attention)
    q = torch.randn(2, 2 * group, length, 16, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, length, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    # Biases are rounded to float32, which these are after that of a query has been added.
    content, drift = torch.randn(2, 2, length), torch.randint(64, (2, 2, length)).cumsum(-1) / 256
    scores, query_bias = content.double(), None
    if start is not None:
        scores, query_bias = (content * 256).round() / 256 + start + drift.double(), -start - drift.double()
    scores.requires_grad_()
    mask = Lifetimes.top_w(content, 40, padding=torch.rand(2, length) < 0.2)
    plan = FlexPlan.of(mask, 2, 2 * group, 2, segment_length=64, block_size=16)
    missing = plan.slots.length - length
    padded = [*(F.pad(x, (0, 0, 0, missing)) for x in (q, k, v)), F.pad(scores, (0, missing))]
    padded_query_bias = None if query_bias is None else F.pad(query_bias, (0, missing))
    found = module._attend_with_gradients(*padded, padded_query_bias, plan, 0.25)[:, :, :length]
    expected = segment_attention(q, k, v, scores, mask, scale=0.25)
    accuracy = 1e-10 if start is None else 1e-7  # a float64 of 1e6 has steps of 1e-10
    torch.testing.assert_close(found, expected, rtol=accuracy, atol=accuracy)
    gradients = [torch.autograd.grad(x.sin().sum(), (q, k, v, scores)) for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=accuracy, atol=accuracy)


def test_gradients_of_biases_in_float64_are_summed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "flex_attention", plain_flex_attention)
    q, k, v = torch.randn(3, 1, 2, 128, 16)
    bias = torch.randn(1, 2, 128, dtype=torch.float64, requires_grad=True)
    plan = FlexPlan.of(Lifetimes.causal(128), 1, 2, 2, segment_length=16, block_size=16)  # keys have up to 8 copies
    out = module._attend_with_gradients(q, k, v, bias, None, plan, 0.25)
    (found,) = torch.autograd.grad(out.sin().sum(), bias)
    assert (found[..., :16] != found[..., :16].float()).any()


# One shape for most of what follows, so that it is compiled once.
SHAPE, HEADS, KV_HEADS = (2, 300, 16), 4, 2


def small_inputs(device: str, length: int = SHAPE[1]) -> list[Tensor]:
    """q, k, v and scores in a shape that is already compiled. They are not contiguous, as after a projection."""
    batch, _, head_dim = SHAPE
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(batch, length, h, head_dim, device=device).transpose(1, 2) for h in heads)
    return [q, k, v, torch.randn(batch, length, KV_HEADS, device=device).transpose(1, 2)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_masks_of_all_kinds_share_one_compilation(mode: type, device: str) -> None:
    length = SHAPE[1]
    padding = torch.rand(2, length, device=device) < 0.3
    padding[1] = True
    for stance in ("default", "fail_on_recompile"):
        *qkv, scores = small_inputs(device)
        masks = [
            Lifetimes.top_w(scores, 40),
            Lifetimes.top_w(scores, 40, padding=padding),
            Lifetimes.top_w(scores, 30, keep_last=8, sinks=2, documents=padding.long()),
            Lifetimes.top_w(scores, 30) | Lifetimes.sliding_window(length, 10, device),
        ]
        for mask in masks[:1] if stance == "default" else masks:
            with mode(), torch.compiler.set_stance(stance):
                out = flex_segment_attention(*qkv, scores, mask, segment_length=128)
            torch.testing.assert_close(out, segment_attention(*qkv, scores, mask), rtol=1e-4, atol=1e-4)
            if mask is masks[1]:
                assert (out[1] == 0).all()  # nobody to look at


def test_biases_far_into_a_text_are_as_exact(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:  # where inductor takes its time
        compiled = torch.compile(module._attend, fullgraph=True, backend="eager")
        monkeypatch.setattr(module, "_compiled_attend", lambda: compiled)
    inputs = small_inputs(device)
    for x in inputs:
        x[1] = x[0]
    *qkv, scores = inputs
    start = torch.tensor([0, 7e6], dtype=torch.float64, device=device)[:, None, None]
    drift = start + torch.rand(1, KV_HEADS, SHAPE[1], dtype=torch.float64, device=device).cumsum(-1) / 2
    mask, query_bias = Lifetimes.top_w(scores, 40), (-drift).requires_grad_()
    exact = segment_attention(*(x.double() for x in qkv), scores + drift, mask)[:1]
    with torch.no_grad():  # in which it does not matter that it requires a gradient
        found = flex_segment_attention(*qkv, scores + drift, mask, query_bias=query_bias)
        near = flex_segment_attention(*qkv, (scores + drift).float(), mask, query_bias=query_bias)
        alone = flex_segment_attention(*qkv, (scores + drift).float(), mask)
    assert torch.equal(near, alone)
    errors, (allowed, far) = ((x.double() - exact).flatten(1).norm(dim=1) for x in (found, near))
    assert (errors <= 2 * allowed).all()
    assert far > 1000 * allowed  # which float64 is for


def test_nan_scores_reach_the_output(device: str) -> None:
    *qkv, scores = small_inputs(device)
    scores = scores.contiguous()
    scores[0, 0, 100] = torch.nan
    with torch.no_grad():
        out = flex_segment_attention(*qkv, scores, Lifetimes.top_w(scores, 40), segment_length=128)
    group = HEADS // KV_HEADS
    assert out[0, :group, 100:].isnan().all()
    assert out[0, :group, :100].isfinite().all()
    assert out[0, group:].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("score", [torch.finfo(torch.float32).min, -3e38, 3e38])
def test_equal_scores_are_no_preference_however_large(score: float, device: str) -> None:
    q, k, v, scores = small_inputs(device)
    mask = Lifetimes.sliding_window(SHAPE[1], 40, device)
    with torch.no_grad():
        out = flex_segment_attention(q * 0, k, v, torch.full_like(scores, score).contiguous(), mask, segment_length=128)
    share = mask.to_dense() / mask.to_dense().sum(-1, keepdim=True)
    torch.testing.assert_close(out, share @ v.repeat_interleave(HEADS // KV_HEADS, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_q_k_and_v_reaches_the_output(which: int, bad: float, device: str) -> None:
    inputs = [x.contiguous() for x in small_inputs(device)]
    inputs[which][0, 0, 100, 3] = bad
    mask = Lifetimes.sliding_window(SHAPE[1], 40, device)
    with torch.no_grad():
        out = flex_segment_attention(*inputs, mask, segment_length=128)
    queries = slice(100, 101) if which == 0 else slice(100, 140)
    if (which, bad) != (1, torch.inf):  # an infinite logit may also be that of minus infinity
        assert not out[0, 0, queries].isfinite().all(-1).any()
    assert out[1].isfinite().all()
    assert out[0, -1].isfinite().all()


def test_lengths_of_one_class_share_one_compilation(device: str) -> None:
    for length, stance in ((300, "default"), (310, "fail_on_recompile"), (384, "fail_on_recompile")):
        q, k, v, scores = (x.contiguous().requires_grad_(ON_GPU) for x in small_inputs(device, length))
        mask = Lifetimes.top_w(scores, 40)
        with torch.compiler.set_stance(stance), torch.set_grad_enabled(ON_GPU):
            out = flex_segment_attention(q, k, v, scores, mask, segment_length=128)
            if device == "cuda":
                torch.autograd.grad(out.sum(), (q, k, v, scores))
        torch.testing.assert_close(out, segment_attention(q, k, v, scores, mask), rtol=1e-4, atol=1e-4)


def test_a_plan_serves_many_calls(device: str) -> None:
    *qkv, scores = small_inputs(device)
    mask = Lifetimes.top_w(scores, 40)
    plan = FlexPlan.of(mask, 2, HEADS, KV_HEADS, segment_length=128)
    with torch.no_grad():
        expected = flex_segment_attention(*qkv, scores, mask, segment_length=128)
        assert torch.equal(flex_segment_attention(*qkv, scores, mask, plan=plan), expected)
    with pytest.raises(ValueError, match=r"plan: expected one for q \[1, .* got one for batch 2, 2 KV heads"):
        flex_segment_attention(*(x[:1] for x in (*qkv, scores)), Lifetimes.causal(SHAPE[1], device), plan=plan)


def test_natural_order_mask_in_anyones_call_compiles_once(device: str) -> None:
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    for stance in ("default", "fail_on_recompile"):
        q, k, v, scores = small_inputs(device)
        mask = Lifetimes.top_w(scores, 40)
        with torch.no_grad(), torch.compiler.set_stance(stance):
            out = compiled(
                q, k, v, score_mod=key_bias_score_mod(scores, HEADS), enable_gqa=True,
                block_mask=block_mask(mask, SHAPE[1], num_heads=HEADS),
            )  # fmt: skip
        torch.testing.assert_close(out, segment_attention(q, k, v, scores, mask), rtol=1e-4, atol=1e-4)


def test_a_score_mod_of_both_biases_is_as_exact_far_into_a_text(device: str) -> None:
    """Not compiled: so FlexAttention gives the gradients of biases on a CPU, too."""
    *qkv, scores = (x[:1] for x in small_inputs(device))
    drift = torch.rand(1, KV_HEADS, SHAPE[1], dtype=torch.float64, device=device).cumsum(-1) / 2
    mask, grad = Lifetimes.top_w(scores, 40), torch.randn_like(qkv[0])
    blocks = block_mask(mask, SHAPE[1], num_heads=HEADS)

    def of(start: float) -> list[Tensor]:
        biases = [(scores + (start + drift)).requires_grad_(), (-start - drift).requires_grad_()]
        mod = key_bias_score_mod(biases[0], HEADS, biases[1])
        out = flex_attention(*qkv, score_mod=mod, block_mask=blocks, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, biases, grad)]

    biases = [(scores + drift).requires_grad_(), (-drift).requires_grad_()]
    out = segment_attention(*(x.double() for x in qkv), biases[0], mask, query_bias=biases[1])
    exact = [out, *torch.autograd.grad(out, biases, grad.double())]
    for x, y, z in zip(of(0.0), of(7e6), exact, strict=True):
        assert x.dtype == (z.dtype if x.shape == drift.shape else torch.float32)
        assert (y - z).norm() <= 2 * (x - z).norm() <= 1e-4


def test_empty_batch(device: str) -> None:
    q, scores = torch.zeros(0, 2, 9, 16, device=device), torch.zeros(0, 2, 9, device=device)
    q.requires_grad_(device == "cuda")
    out = flex_segment_attention(q, q, q, scores, Lifetimes.top_w(scores, 3))
    assert out.shape == q.shape
    assert out.requires_grad == (device == "cuda")


@pytest.mark.parametrize(
    ("length", "capacity", "segment", "expected"),
    [
        (1, 1, None, (128, 128)),
        (1000, 1000, None, (1024, 1024)),  # one segment: lengths up to powers of two
        (300, 300, None, (384, 384)),  # but never more than the capacity asks for
        (32768, 1024, None, (1024, 32768)),
        (8191, 256, None, (256, 8192)),
        (33 * 256, 256, None, (256, 40 * 256)),  # numbers of segments with three significant bits
        (4096, 100, 200, (256, 4096)),
    ],
)
def test_lengths_fall_into_few_classes(
    length: int, capacity: int, segment: int | None, expected: tuple[int, int]
) -> None:
    from dma_flex.segment_plan import padded_length

    assert padded_length(length, capacity, segment, 128) == expected


@needs_gpu
def test_autocast_and_checkpointing_change_nothing() -> None:
    inputs = [x.requires_grad_() for x in small_inputs("cuda")]
    mask = Lifetimes.top_w(inputs[3], 40)

    def loss(*x: Tensor) -> Tensor:
        return flex_segment_attention(*x, mask).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_equal(torch.autograd.grad(loss(*inputs), inputs), expected)
    assert_equal(torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs), expected)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Check for equality, except for the rounding of sums in a different order."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("trained", range(4))
def test_each_gradient_alone(trained: int) -> None:
    inputs = small_inputs("cuda")
    mask = Lifetimes.top_w(inputs[3], 40)
    inputs[trained].requires_grad_()
    (found,) = torch.autograd.grad(flex_segment_attention(*inputs, mask).sin().sum(), inputs[trained])
    (expected,) = torch.autograd.grad(segment_attention(*inputs, mask).sin().sum(), inputs[trained])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_bad_inputs(device: str) -> None:
    q, k, v, scores = small_inputs(device)
    mask = Lifetimes.top_w(scores, 40)
    with pytest.raises(ValueError, match=r"computes in float32, bfloat16 or float16, got torch.float64; use .*'torch'"):
        flex_segment_attention(*(x.double() for x in (q, k, v, scores)), mask)
    with pytest.raises(ValueError, match=r"lifetimes: expected \[2 or 1, 2 or 1, 300\] .* got \[1, 1, 299\]"):
        flex_segment_attention(q, k, v, scores, Lifetimes.causal(299, device))
    with pytest.raises(ValueError, match=r"key_bias: expected torch\.float32"):
        flex_segment_attention(q, k, v, scores.bfloat16(), mask)
    plan = FlexPlan.of(mask, 2, HEADS, KV_HEADS)
    with pytest.raises(ValueError, match="expected either segment_length or plan, got both"):
        flex_segment_attention(q, k, v, scores, mask, segment_length=128, plan=plan)
    with pytest.raises(ValueError, match="num_heads a multiple of num_kv_heads, got 2, 3 and 2"):
        FlexPlan.of(mask, 2, 3, KV_HEADS)
    with pytest.raises(ValueError, match=r"lifetimes: expected \[3 or 1, 2 or 1, N\], got \[2, 2, 300\]"):
        FlexPlan.of(mask, 3, HEADS, KV_HEADS)
    with pytest.raises(ValueError, match="segment_length: expected at least 1, got 0"):
        flex_segment_attention(q, k, v, scores, mask, segment_length=0)
    with pytest.raises(ValueError, match="born at its own position"):
        flex_segment_attention(q, k, v, scores, Lifetimes(mask.birth + 1, mask.death, 40))
    trained = scores.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"without a gradient, got \[2, 2, 300\] .* use backend 'triton' or 'torch'"):
        flex_segment_attention(q, k, v, scores, mask, query_bias=trained)
    with pytest.raises(ValueError, match=r"query_bias: expected \[2, 2, 300\] .* got \[2, 2, 299\]"):
        flex_segment_attention(q, k, v, scores, mask, query_bias=scores[..., 1:])
    with pytest.raises(ValueError, match="block_size: expected a power of two, got 100"):
        FlexPlan.of(mask, 2, HEADS, KV_HEADS, block_size=100)


@pytest.mark.skipif(ON_GPU, reason="about machines without a GPU")
def test_training_on_a_cpu_names_the_backend_that_can() -> None:
    q, k, v, scores = small_inputs("cpu")
    with pytest.raises(ValueError, match=r"'flex' trains on CUDA only, got tensors on cpu .* use backend 'torch'"):
        flex_segment_attention(q, k, v, scores.requires_grad_(), Lifetimes.causal(SHAPE[1]))


@needs_gpu
@pytest.mark.parametrize("head_dim", [8, 272])
def test_bad_head_dims_on_a_gpu(head_dim: int) -> None:
    q, scores = torch.zeros(1, 1, 9, head_dim, device="cuda"), torch.zeros(1, 1, 9, device="cuda")
    with pytest.raises(ValueError, match=f"head dim from 16 to 256 on CUDA, got {head_dim}; use backend 'torch'"):
        flex_segment_attention(q, q, q, scores, Lifetimes.causal(9, "cuda"))


def test_the_recompile_limit_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(head_dim: int) -> Tensor:
        q, scores = torch.randn(1, 1, 64, head_dim, device=device), torch.randn(1, 1, 64, device=device)
        return flex_segment_attention(q, q, q, scores, Lifetimes.causal(64, device))

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # inductor takes seconds
    torch._dynamo.reset()  # behind all that shares a compilation
    module._compiled_attend.cache_clear()
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
            attend(16)
            message = r"recompile_limit = 1 allows, and q \[1, 1, 128, 32\] .* needs one more"
            with pytest.raises(RuntimeError, match=message):
                attend(32)
    finally:
        module._compiled_attend.cache_clear()
