"""A bias of queries does not change the output. Its gradient is the sum of dS over keys, rounded as for key biases.

B batch, H query heads, G KV heads, N length, D head dim.
"""

from collections.abc import Callable

import pytest
import torch
from exactness import results
from large_tiles import enlarge_attention_tiles
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels import (
    Lifetimes,
    SegmentSlots,
    fused_attention,
    reference_attention,
    segment_attention,
)

ON_GPU = torch.cuda.is_available()
# The interpreter's tl.dot multiplies bfloat16 wrong, so it is refused there.
HALVES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16]
NAMES = ("out", "dq", "dk", "dv", "dkey_bias", "dquery_bias")


@pytest.fixture(autouse=True)
def _large_tiles_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        enlarge_attention_tiles(monkeypatch)


def make_inputs(
    length: int, device: str, dtype: torch.dtype = torch.float32, head_dim: int = 16, batch: int = 2
) -> tuple[list[Tensor], Tensor]:
    """q, k, v and biases of keys and of queries, of 4 heads in 2 groups, and a gradient of the output."""
    q, k, v, grad = (torch.randn(batch, length, h, head_dim, device=device).transpose(1, 2) for h in (4, 2, 2, 4))
    biases = torch.randn(2, batch, 2, length, device=device)
    return [*(x.to(dtype) for x in (q, k, v)), *biases], grad.to(dtype)


def over(function: Callable[..., Tensor], mask: Lifetimes) -> Callable[..., Tensor]:
    """An attention with a given mask, as a function of q, k, v, key_bias and optionally query_bias."""
    given = mask.to_dense() if function is reference_attention else mask

    def attention(*x: Tensor) -> Tensor:
        return function(*x[:4], given, query_bias=x[4] if len(x) > 4 else None)

    return attention


def gradients(attention: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    return results(lambda *x: attention(*x[:-1]), inputs, grad, grad)


def exact_sums(inputs: list[Tensor], mask: Lifetimes, out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dS over keys if only the output is rounded, float64 `[B, G, N]`: sums of dO · (O - rounded O).

    The second result is how far rounding may move them: a few eps of float32 times the size of their terms and of the
    logits, and half an eps of each dS, which is rounded to the dtype of q.
    """
    q, k, v, key_bias, grad = (x.double() for x in (*inputs[:4], grad))
    attention, group = over(reference_attention, mask), q.shape[1] // k.shape[1]
    largest = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() * q.shape[-1] ** -0.5 + key_bias.abs().amax()
    terms = 2 * (grad.abs() * attention(q, k, v.abs(), key_bias)).sum(-1)
    sums = (grad * (attention(q, k, v, key_bias) - out.double())).sum(-1)
    sums, terms = (x.unflatten(1, (-1, group)).sum(2) for x in (sums, terms))
    dtype = inputs[0].dtype
    each = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return sums, (2 * torch.finfo(torch.float32).eps * (1 + largest) + each) * terms


@pytest.mark.parametrize("function", [fused_attention, segment_attention, reference_attention])
def test_all_else_has_the_same_bits(function: Callable[..., Tensor], device: str) -> None:
    inputs, grad = make_inputs(111, device)
    inputs[4][:, :, 3], inputs[4][:, :, 5], inputs[4][:, :, 7] = 1e30, torch.inf, torch.nan
    attention = over(function, Lifetimes.top_w(inputs[3], 20, keep_last=2))
    with poisoned_buffers():
        found, expected = gradients(attention, inputs, grad), gradients(attention, inputs[:4], grad)
    for name, x, y in zip(NAMES, found, expected, strict=False):
        assert torch.equal(x, y), name
    assert found[-1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("length", [1, 63, 257])
def test_is_the_rounding_of_the_output(length: int, dtype: torch.dtype, device: str) -> None:
    inputs, grad = make_inputs(length, device, dtype, head_dim=20)
    padding = torch.zeros(2, length, dtype=torch.bool, device=device)
    padding[0, : length // 3] = True
    mask = Lifetimes.top_w(inputs[3], 20, padding=padding)
    with poisoned_buffers():
        out, *_, found = gradients(over(fused_attention, mask), inputs, grad)
    expected, rounding = exact_sums(inputs, mask, out.detach(), grad)
    assert found.dtype == torch.float32
    assert not found[0, :, : length // 3].any()  # these see no key
    assert ((found - expected).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_over_queries_and_over_keys_are_one(dtype: torch.dtype, device: str) -> None:
    """Both add up all of dS, and agree far better than what rounding of the output leaves of it."""
    inputs, grad = make_inputs(257, device, dtype)
    *_, by_key, by_query = gradients(over(fused_attention, Lifetimes.top_w(inputs[3], 40)), inputs, grad)
    by_key, by_query = by_key.double(), by_query.double()
    rounding = torch.finfo(torch.float32).eps * by_key.abs().sum((0, 2))
    difference = (by_key - by_query).sum((0, 2)).abs()
    assert (difference <= 2 * rounding).all()
    assert (difference <= by_query.norm(dim=(0, 2)) / 100).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_cumulated_gates(dtype: torch.dtype, device: str) -> None:
    """A gate l counts for keys from l on, and not for queries from l on: the sums behind it keep no rounding."""
    length = 1024 if ON_GPU else 512
    inputs, grad = make_inputs(length, device, dtype, head_dim=64, batch=1)
    mask = Lifetimes.sliding_window(length, 128, device)
    *_, by_key, by_query = gradients(over(fused_attention, mask), inputs, grad)
    double = [x.double() for x in inputs[:4]]
    exact = gradients(over(reference_attention, mask), double, grad.double())[-1]

    def of_gates(x: Tensor) -> Tensor:
        return x.double().flip(-1).cumsum(-1).flip(-1)

    expected = of_gates(exact)
    both, key_side = ((of_gates(x) - expected).norm() / expected.norm() for x in (by_key - by_query, by_key))
    print(f"{dtype}: {both:.2e} of both sides, {key_side:.2e} of the keys' side")
    assert both < 0.01


def test_plain_forms_have_no_gradient_but_rounding() -> None:
    inputs, _ = make_inputs(11, "cpu", torch.float64, head_dim=3)
    inputs = [x.double().requires_grad_() for x in inputs]
    mask = Lifetimes.top_w(inputs[3], 3)
    for function in (segment_attention, reference_attention):
        assert torch.autograd.gradcheck(over(function, mask), inputs)
    mask = Lifetimes.top_w(inputs[3], 3).to_dense()
    both = torch.autograd.gradcheck(
        lambda *x: reference_attention(*x[:4], mask, return_lse=True, query_bias=x[4]), inputs
    )
    assert both
    short = [x[:1, :, :5].detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(over(segment_attention, Lifetimes.top_w(short[3], 3)), short)


@pytest.mark.parametrize("function", [segment_attention, reference_attention])
def test_plain_forms_send_each_sum_to_its_query(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without softmax these sums are not 0."""
    inputs, grad = make_inputs(63, "cpu", torch.float64)
    inputs, mask = [x.double() for x in inputs], Lifetimes.top_w(inputs[3], 9)
    module = "attention.torch_backend" if function is segment_attention else "reference"
    monkeypatch.setattr(f"dma_kernels.{module}.masked_average", lambda logits, seen, v: logits.where(seen, 0) @ v)
    found = gradients(over(function, mask), inputs, grad)[-1]
    ds = grad.unflatten(1, (2, 2)) @ inputs[2].mT[:, :, None]  # [B, G, R, N, N]
    torch.testing.assert_close(found, ds.where(mask.to_dense()[:, :, None], 0).sum((2, 4)))


def test_the_kernel_is_asked_only_for_what_is_trained(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query bias that needs no gradient costs what none costs."""
    import dma_kernels.attention.kernels.backward as module

    launcher, asked = module.launcher_of_query_gradients, []

    def launcher_recorded(*x: Tensor, dquery_bias: Tensor | None = None, **options: object) -> Callable[..., None]:
        asked.append(dquery_bias is not None)
        return launcher(*x, dquery_bias=dquery_bias, **options)

    monkeypatch.setattr(module, "launcher_of_query_gradients", launcher_recorded)
    inputs, grad = make_inputs(20, device)
    mask = Lifetimes.top_w(inputs[3], 9)
    for trained in ((0,), (4,), (0, 1, 2, 3, 4)):
        leaves = [x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs)]
        over(fused_attention, mask)(*leaves).backward(grad)
        assert [x.grad is not None for x in leaves] == [i in trained for i in range(5)]
    assert asked == [False, True, True]


def test_segments_groups_and_heads_of_other_sizes(device: str) -> None:
    """8 heads of one group, a scale and a segment shorter than the sequence."""
    q, k, v = (torch.randn(1, h, 300, 16, device=device).half() for h in (8, 1, 1))
    key_bias, query_bias = torch.randn(2, 1, 1, 300, device=device)
    mask = Lifetimes.top_w(key_bias, 7)
    inputs, grad = [q, k, v, key_bias, query_bias], torch.randn_like(q)

    def attention(*x: Tensor) -> Tensor:
        return fused_attention(*x[:4], mask, segment_length=128, query_bias=x[4])

    out, *_, found = gradients(attention, inputs, grad)
    expected, rounding = exact_sums(inputs, mask, out.detach(), grad)
    assert ((found - expected).abs() <= rounding).all()


def test_compiled_equals_eager(device: str) -> None:
    inputs, grad = make_inputs(111, device, torch.float16)
    mask = Lifetimes.sliding_window(111, 20, device)

    def attention(*x: Tensor) -> Tensor:
        return fused_attention(*x[:4], mask, query_bias=2 * x[4])

    compiled = torch.compile(attention, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    found, expected = (gradients(function, inputs, grad) for function in (compiled, attention))
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert torch.equal(x, y), name
    assert found[-1].any()


def test_operations_are_registered_as_torch_expects(device: str) -> None:
    """Fakes have the shapes and strides of the real results; autograd is there; nothing is mutated."""
    inputs, _ = make_inputs(40, device)
    slots = SegmentSlots.of(Lifetimes.top_w(inputs[3], 9), 2, 2)
    tensors = (slots.copies.row, slots.copies.first, slots.copies.slot, slots.birth, slots.death)
    sizes = (slots.segment_length, 0.25)
    forward = (*(x.requires_grad_() for x in inputs[:4]), *tensors, *sizes, inputs[4].requires_grad_())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.dma_kernels.attend_slots, forward, test_utils=tests)
    with torch.no_grad():
        out, lse, *by_slot = torch.ops.dma_kernels.attend_slots(*forward)
    backward = (out, inputs[0].detach(), *by_slot, out, lse, *tensors[1:], *sizes)
    for asked in (False, True):
        torch.library.opcheck(
            torch.ops.dma_kernels.attend_slots_backward, backward, {"query_bias": asked},
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_same_bits_in_every_run(device: str) -> None:
    inputs, grad = make_inputs(5000, device, torch.bfloat16, head_dim=128)
    attention = over(fused_attention, Lifetimes.top_w(inputs[3], 512))
    for name, x, y in zip(NAMES, *(gradients(attention, inputs, grad) for _ in range(2)), strict=True):
        assert torch.equal(x, y), name


def test_empty_batch(device: str) -> None:
    q, bias = torch.zeros(0, 2, 9, 16, device=device), torch.zeros(0, 2, 9, device=device, requires_grad=True)
    for function in (fused_attention, segment_attention, reference_attention):
        out = over(function, Lifetimes.top_w(bias.detach(), 3))(q, q, q, bias.detach(), bias)
        assert torch.autograd.grad(out.sum(), bias)[0].shape == bias.shape


@pytest.mark.parametrize("function", [fused_attention, segment_attention, reference_attention])
def test_bad_inputs(function: Callable[..., Tensor], device: str) -> None:
    (*inputs, query_bias), _ = make_inputs(40, device)
    attention = over(function, Lifetimes.causal(40, device))
    with pytest.raises(ValueError, match=r"query_bias: expected \[2, 2, 40\] .* got \[2, 1, 40\]"):
        attention(*inputs, query_bias[:, :1])
    with pytest.raises(ValueError, match=r"query_bias: expected torch\.float32 .* got torch\.bfloat16"):
        attention(*inputs, query_bias.bfloat16())
    with pytest.raises(ValueError, match=r"query_bias: expected on .* got meta"):
        attention(*inputs, query_bias.to("meta"))


def test_no_forward_mode_in_triton(device: str) -> None:
    (*inputs, query_bias), _ = make_inputs(40, device)
    mask = Lifetimes.causal(40, device)
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: fused_attention(*inputs, mask, query_bias=x), (query_bias,), (query_bias,))
