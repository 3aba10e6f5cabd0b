"""The segment backend equals the O(N²) definition in output, log-sum-exp and every gradient."""

from collections.abc import Callable

import masks
import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor

from dma_kernels import (
    Lifetimes,
    key_ranks,
    rank_bias,
    reference_attention,
    reference_mask,
    segment_attention,
)
from dma_kernels.reference import masked_average, masked_logsumexp

KV_HEADS, HEAD_DIM = 2, 4


def make_inputs(length: int, group: int, ties: bool) -> list[Tensor]:
    """Leaf tensors q, k, v, A and Δ in float64. With `ties`, values repeat, as those of repeated tokens do."""
    q = torch.randn(2, KV_HEADS * group, length, HEAD_DIM, dtype=torch.float64)
    k, v = torch.randn(2, 2, KV_HEADS, length, HEAD_DIM, dtype=torch.float64)
    if ties:
        tokens = torch.randint(0, 5, (2, length))
        v = torch.randn(5, KV_HEADS, HEAD_DIM, dtype=torch.float64)[tokens].transpose(1, 2).contiguous()
    A = torch.tensor([0.7, -0.4], dtype=torch.float64)
    delta = torch.randn(KV_HEADS, KV_HEADS * HEAD_DIM, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, A, delta)]


def run(inputs: list[Tensor], window: int, arguments: dict, backend: str, weight: Tensor, form: str) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of all leaves."""
    q, k, v, A, delta = inputs
    ranks = key_ranks(v, A, delta)
    scores = rank_bias(ranks, form)
    if backend == "reference":
        mask = reference_mask(ranks, window, **arguments)
        out, lse = reference_attention(q, k, v, scores, mask, return_lse=True)
    else:
        lifetimes = Lifetimes.top_w(ranks, window, **arguments)
        out, lse = segment_attention(q, k, v, scores, lifetimes, return_lse=True)
    seen = lse.isfinite()
    loss = (out * weight).sum() + lse[seen].sum()
    return [out, lse, *torch.autograd.grad(loss, inputs, materialize_grads=True)]


@pytest.mark.parametrize(
    ("length", "group", "ties", "case"), covering(masks.LENGTHS, [1, 2, 4], [False, True], masks.CASES), ids=str
)
def test_equals_the_definition(length: int, group: int, ties: bool, case: masks.Case) -> None:
    inputs, arguments = make_inputs(length, group, ties), case.arguments(2, length)
    weight = torch.randn_like(inputs[0])
    for form, window in zip(["exp", "linear"] * 3, masks.windows(length), strict=False):
        expected = run(inputs, window, arguments, "reference", weight, form)
        found = run(inputs, window, arguments, "torch", weight, form)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dA", "dΔ"), found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=f"{name} differs at w = {window}")


def test_gradcheck() -> None:
    q, k, v, _, _ = make_inputs(length=11, group=2, ties=False)
    scores = torch.randn(2, KV_HEADS, 11, dtype=torch.float64, requires_grad=True)
    lifetimes = Lifetimes.top_w(scores, 3)
    assert torch.autograd.gradcheck(lambda *x: segment_attention(*x, lifetimes, segment_length=4), (q, k, v, scores))
    short = [x[:1, :, :5].detach().requires_grad_() for x in (q, k, v, scores)]
    lifetimes = Lifetimes.top_w(short[-1], 3)
    assert torch.autograd.gradgradcheck(lambda *x: segment_attention(*x, lifetimes, segment_length=2), short)


@pytest.mark.parametrize("window", [1, 7, 63, 70])
def test_constant_scores_are_sliding_window_attention(window: int) -> None:
    q, k, v = (torch.randn(2, 4, 63, 8) for _ in range(3))
    position = torch.arange(63)
    band = (position <= position[:, None]) & (position > position[:, None] - window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
    out = segment_attention(q, k, v, torch.full((2, 4, 63), 1.0), Lifetimes.top_w(torch.zeros(2, 4, 63), window))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_the_reference_s(dtype: torch.dtype) -> None:
    leaves = [torch.randn(2, heads, 111, 8).to(dtype) for heads in (4, 2, 2)]
    scores, grad = torch.randn(2, 2, 111), torch.randn(2, 4, 111, 8)
    lifetimes = Lifetimes.top_w(scores, 13)

    def results(function, mask, to: torch.dtype) -> list[Tensor]:
        inputs = [*(x.to(to) for x in leaves), scores.to(torch.promote_types(to, torch.float32))]
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = function(*inputs, mask)
        return [out, *torch.autograd.grad(out, inputs, grad.to(to))]

    exact = results(reference_attention, lifetimes.to_dense(), torch.float64)
    reference = results(reference_attention, lifetimes.to_dense(), dtype)
    fast = results(segment_attention, lifetimes, dtype)
    for x, y, z in zip(fast, reference, exact, strict=True):
        assert x.isfinite().all()
        assert (x.double() - z).abs().max() <= 2 * (y.double() - z).abs().max()


def test_non_contiguous_inputs() -> None:
    q, k, v = (torch.randn(2, 63, 4, 8).transpose(1, 2) for _ in range(3))
    scores = torch.randn(2, 63, 4).transpose(1, 2)
    lifetimes = Lifetimes.top_w(scores, 9)
    expected = segment_attention(*(x.contiguous() for x in (q, k, v, scores)), lifetimes)
    assert torch.equal(segment_attention(q, k, v, scores, lifetimes), expected)


def test_one_mask_for_all_sequences_and_heads() -> None:
    q, k, v = (torch.randn(2, 4, 63, 8) for _ in range(3))
    scores, window = torch.randn(2, 4, 63), Lifetimes.sliding_window(63, 9)
    expected = reference_attention(q, k, v, scores, window.to_dense())
    torch.testing.assert_close(segment_attention(q, k, v, scores, window), expected)


def test_empty_batch() -> None:
    q, scores = torch.zeros(0, 2, 9, 4), torch.zeros(0, 2, 9)
    assert segment_attention(q, q, q, scores, Lifetimes.top_w(scores, 3)).shape == (0, 2, 9, 4)


def _inputs(**changed: Tensor) -> dict[str, Tensor]:
    inputs = {"q": torch.zeros(2, 4, 8, 4), "k": torch.zeros(2, 2, 8, 4), "v": torch.zeros(2, 2, 8, 4)}
    return inputs | {"key_bias": torch.zeros(2, 2, 8)} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(4, 8, 4)}, r"expected q \[B, H, N, D\]"),
        ({"k": torch.zeros(2, 2, 9, 4)}, r"k: expected \[2, 2, 8, 4\] .* got \[2, 2, 9, 4\]"),
        ({"key_bias": torch.zeros(2, 4, 8)}, r"key_bias: expected \[2, 2, 8\]"),
        ({"q": torch.zeros(2, 3, 8, 4)}, "query heads must be a multiple of KV heads, got 3 and 2"),
        ({"v": torch.zeros(2, 2, 8, 4).half()}, "one floating dtype"),
        ({"key_bias": torch.zeros(2, 2, 8).bfloat16()}, "key_bias: expected torch.float32"),
        ({"v": torch.zeros(2, 2, 8, 4, device="meta")}, "v: expected on cpu as q, got meta"),
    ],
)
def test_bad_inputs(changed: dict[str, Tensor], message: str) -> None:
    inputs = _inputs(**changed)
    with pytest.raises(ValueError, match=message):
        segment_attention(**inputs, lifetimes=Lifetimes.causal(8))
    with pytest.raises(ValueError, match=message):
        reference_attention(**inputs, mask=Lifetimes.causal(8).to_dense())


@pytest.mark.parametrize("function", [segment_attention, reference_attention])
def test_minus_infinity_as_only_score_is_no_key(function: Callable[..., Tensor]) -> None:
    q, k, v = (torch.randn(1, 1, 9, 4) for _ in range(3))
    scores = torch.zeros(1, 1, 9)
    scores[..., 0] = -torch.inf
    mask = Lifetimes.causal(9) if function is segment_attention else Lifetimes.causal(9).to_dense()
    out, lse = function(q, k, v, scores, mask, return_lse=True)
    assert (out[0, 0, 0] == 0).all()
    assert lse[0, 0, 0] == -torch.inf
    assert lse[0, 0, 1:].isfinite().all()
    inputs = [x.requires_grad_() for x in (q, k, v, torch.full_like(scores, -torch.inf))]
    for gradient in torch.autograd.grad(function(*inputs, mask).sum(), inputs):
        assert (gradient == 0).all()


def test_autocast_does_not_change_the_definition() -> None:
    q, k, v = (torch.randn(1, 2, 63, 8) for _ in range(3))
    scores, mask = torch.randn(1, 2, 63), Lifetimes.causal(63).to_dense()
    expected = reference_attention(q, k, v, scores, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference_attention(q, k, v, scores, mask), expected)


def test_mask_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"mask: expected bool \[2 or 1, 2 or 1, 8, 8\] on cpu, got torch.bool"):
        reference_attention(**_inputs(), mask=Lifetimes.causal(9).to_dense())
    with pytest.raises(ValueError, match=r"lifetimes: expected \[2 or 1, 2 or 1, 8\] .* got \[1, 1, 9\]"):
        segment_attention(**_inputs(), lifetimes=Lifetimes.causal(9))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", masks.CASES, ids=str)
def test_equals_the_cpu_on_a_gpu(case: masks.Case) -> None:
    inputs, arguments = make_inputs(length=257, group=2, ties=True), case.arguments(2, 257)
    weight = torch.randn_like(inputs[0])
    expected = run(inputs, 20, arguments, "torch", weight, "exp")
    moved = [x.detach().cuda().requires_grad_() for x in inputs]
    arguments = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    found = run(moved, 20, arguments, "torch", weight.cuda(), "exp")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("score", [torch.finfo(torch.float32).min, -3e38, 3e38])
@pytest.mark.parametrize("function", [segment_attention, reference_attention])
def test_equal_scores_are_no_preference_however_large(function: Callable[..., Tensor], score: float) -> None:
    k, v, weight = torch.randn(3, 1, 1, 20, 4)
    inputs = [x.requires_grad_() for x in (torch.zeros(1, 1, 20, 4), k, v, torch.full((1, 1, 20), score))]
    mask = Lifetimes.sliding_window(20, 7)
    dense = mask.to_dense()
    out, lse = function(*inputs, mask if function is segment_attention else dense, return_lse=True)
    share = (dense / dense.sum(-1, keepdim=True))[0, 0]
    torch.testing.assert_close(out[0, 0], share @ v[0, 0])
    torch.testing.assert_close(lse, torch.full_like(lse, score).clamp(-torch.finfo(lse.dtype).max / 4, 8.507059e37))
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    torch.testing.assert_close(gradients[2][0, 0], share.T @ weight[0, 0])
    centered = weight @ v.transpose(-1, -2) - (weight * out).sum(-1, keepdim=True)
    torch.testing.assert_close(gradients[0][0, 0], (share * centered[0, 0]) @ k[0, 0] / 2)
    assert not gradients[1].any()
    assert not gradients[3].any()


def test_a_logit_equal_to_the_least_number_is_a_key() -> None:
    """So are keys whose q·k is as low as it can be; masked ones beside them get no weight."""
    logits, mask = torch.full((2, 3), torch.finfo(torch.float32).min), torch.tensor([[True, True, False], [False] * 3])
    v = torch.tensor([[1.0], [2.0], [7.0]])
    assert masked_average(logits, mask, v).tolist() == [[1.5], [0.0]]
    assert masked_logsumexp(logits, mask).tolist() == [torch.finfo(torch.float32).min, -torch.inf]


@pytest.mark.parametrize("function", [segment_attention, reference_attention])
def test_an_infinite_score_shows(function: Callable[..., Tensor]) -> None:
    """exp(rank) of a rank above 88.7."""
    q, k, v = torch.randn(3, 1, 1, 20, 4)
    ranks = torch.zeros(1, 1, 20)
    ranks[..., 9] = 89
    mask = Lifetimes.top_w(ranks, 3)
    out = function(q, k, v, rank_bias(ranks), mask if function is segment_attention else mask.to_dense())
    assert out[:, :, 9:].isnan().all()
    assert out[:, :, :9].isfinite().all() or function is segment_attention  # of the segment, which is passed over whole
