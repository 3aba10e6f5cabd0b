"""Ranks, scores and the bits that are compared."""

import pytest
import torch
import torch.nn.functional as F

from dma_kernels import Lifetimes, key_ranks, rank_bias, reference_attention, segment_attention
from dma_kernels.ranks import ordered_bits, saturated


def test_ranks_follow_the_formula() -> None:
    values, A, weight = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(3), torch.randn(3, 12)
    ranks = key_ranks(values, A, weight)
    for b, g, n in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        u = weight[g].double() @ values[b, :, n].flatten()
        torch.testing.assert_close(ranks[b, g, n], A[g].double() * F.softplus(u))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ranks_are_float32_under_autocast_too(dtype: torch.dtype) -> None:
    values, A, weight = torch.randn(1, 2, 9, 4).to(dtype), torch.randn(2), torch.randn(2, 8)
    expected = key_ranks(values.float(), A, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranks = key_ranks(values, A, weight)
    assert ranks.dtype == torch.float32
    torch.testing.assert_close(ranks, expected, rtol=0, atol=0)


def test_score_forms() -> None:
    ranks = torch.randn(2, 3, 4)
    torch.testing.assert_close(rank_bias(ranks, "exp"), ranks.exp())
    assert rank_bias(ranks, "linear") is ranks
    with pytest.raises(ValueError, match=r"score_form: expected one of \['exp', 'linear'\], got 'sigmoid'"):
        rank_bias(ranks, "sigmoid")


@pytest.mark.parametrize(
    "shapes", [((2, 5, 4), (2,), (2, 8)), ((1, 2, 5, 4), (3,), (2, 8)), ((1, 2, 5, 4), (2,), (2, 4))]
)
def test_ranks_refuse_shapes_that_do_not_belong_together(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        key_ranks(*(torch.zeros(shape) for shape in shapes))


def test_bits_order_as_the_numbers_do() -> None:
    numbers = torch.tensor([-torch.inf, -3e38, -1.5, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1.5, 3e38, torch.inf, torch.nan])
    bits = ordered_bits(numbers)
    assert (bits[1:] > bits[:-1]).all()
    assert ordered_bits(torch.tensor(-0.0)) == ordered_bits(torch.tensor(0.0))
    assert ordered_bits(-torch.tensor(torch.nan)) == bits[-1]


def test_bits_compare_sixteen_mantissa_bits() -> None:
    one = torch.tensor(1.0)
    assert ordered_bits(one + 2**-18) == ordered_bits(one)  # below half of the last compared bit
    assert ordered_bits(one + 2**-16) > ordered_bits(one)
    random = torch.randn(10_000)
    rounded = random * (1 + (torch.rand(10_000) - 0.5) * 2**-17)
    a, b = ordered_bits(random), ordered_bits(rounded)
    assert ((a - b).abs() <= 128).all()  # never further than one step of the grid
    order = random.argsort()
    assert (a[order][1:] >= a[order][:-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_scores_are_bounded_and_others_stay(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    scores = torch.tensor([-largest, -0.0, 1.5, 2e37, largest], dtype=dtype, requires_grad=True)
    out = saturated(scores)
    assert out.tolist() == [-largest / 4, 0.0, 1.5, scores[3].item(), largest / 4]
    out.sum().backward()
    assert scores.grad.tolist() == [0, 1, 1, 1, 0]
    shown = torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=dtype)
    torch.testing.assert_close(saturated(shown), shown, rtol=0, atol=0, equal_nan=True)
    compiled = torch.compile(saturated, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), out)


def test_the_old_name_of_a_bias_is_taken_with_one_notice() -> None:
    q, bias, mask = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9), Lifetimes.causal(9)
    for attention, over in ((segment_attention, mask), (reference_attention, mask.to_dense())):
        with pytest.warns(FutureWarning, match="scores is called key_bias now") as told:
            out = attention(q, q, q, scores=bias, **{"lifetimes" if over is mask else "mask": over})
        assert len(told) == 1
        assert torch.equal(out, attention(q, q, q, bias, over))
