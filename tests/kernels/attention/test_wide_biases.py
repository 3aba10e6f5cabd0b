"""Biases in float64 give results that are as exact far into a text as at its beginning: outputs and all gradients.

B batch, H query heads, G KV heads, N length, D head dim.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from exactness import results
from large_tiles import enlarge_attention_tiles
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels import Lifetimes, SegmentSlots, fused_attention, reference_attention, segment_attention
from dma_kernels.segments.gather import sum_copies_reference

ON_GPU = torch.cuda.is_available()
BACKENDS = [fused_attention, segment_attention, reference_attention]
STARTS = (0.0, 1e3, 1e6, 7e6)  # nats of drift before the first position; one sequence of a batch each
NAMES = ("out", "dq", "dk", "dv", "dkey_bias", "dquery_bias")


@pytest.fixture(autouse=True)
def _large_tiles_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        enlarge_attention_tiles(monkeypatch)


def drifting(
    length: int, group: int, kv_heads: int, dtype: torch.dtype, device: str, starts: tuple[float, ...] = STARTS
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, float64 biases of keys and queries, and an output gradient. Sequences differ only in their start."""
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    q, k, v, grad = (torch.randn(1, length, h, 16, device=device).transpose(1, 2) for h in heads)
    content = torch.randn(1, kv_heads, length, device=device)
    steps = torch.rand(1, kv_heads, length, dtype=torch.float64, device=device) / 2
    start = torch.tensor(starts, dtype=torch.float64, device=device)[:, None, None]
    drift = start + steps.cumsum(-1)
    q, k, v, grad = (x.to(dtype).expand(len(starts), -1, -1, -1) for x in (q, k, v, grad))
    return [q, k, v, content + drift, -drift], grad


def selected(length: int, kv_heads: int, device: str, packing: str) -> Lifetimes:
    """A mask that drops keys. Keys live in several segments. The mask is the same for each sequence."""
    ranks = torch.randn(1, kv_heads, length, device=device) + torch.arange(length, device=device) / 10
    documents = (torch.arange(length, device=device) > length // 3).long()[None] if packing == "documents" else None
    padding = torch.arange(length, device=device)[None] < 5 if packing == "padding" else None
    return Lifetimes.top_w(ranks, 30, documents=documents, padding=padding, keep_last=2)


def over(function: Callable[..., Tensor], mask: Lifetimes) -> Callable[..., Tensor]:
    """An attention with a given mask, as a function of q, k, v, key_bias and query_bias."""
    given = mask.to_dense() if function is reference_attention else mask
    return lambda *x: function(*x[:4], given, query_bias=x[4])


def found_by(function: Callable[..., Tensor], inputs: list[Tensor], mask: Lifetimes, grad: Tensor) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    attention = over(function, mask)
    return results(lambda *x: attention(*x[:-1]), inputs, grad, grad)


def in_double(inputs: list[Tensor], mask: Lifetimes, grad: Tensor) -> list[Tensor]:
    """The definition in float64. Each pair has the same bias for every start."""
    first = [x[:1].double() for x in inputs]
    return [x.expand(len(inputs[0]), *x.shape[1:]) for x in found_by(reference_attention, first, mask, grad[:1])]


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Error of each sequence, `[B]`."""
    return (found.double() - exact).flatten(1).norm(dim=1)


CASES = [  # length, group, KV heads, dtype, packing
    (63, 2, 2, torch.float32, "none"),
    (150, 2, 1, torch.float16, "documents"),
    (257, 3, 2, torch.bfloat16, "padding"),
]


def named(x: object) -> str:
    """The name of a parameter in a test id. The string of a function would contain its memory address."""
    return getattr(x, "__name__", str(x))


# The interpreter's tl.dot multiplies bfloat16 wrong, so it is refused there.
KERNEL_CASES = CASES if ON_GPU else CASES[:2]


@pytest.mark.parametrize(
    ("function", "case"),
    [(x, case) for x in BACKENDS for case in (KERNEL_CASES if x is fused_attention else CASES)],
    ids=named,
)
def test_the_start_of_the_drift_changes_no_error(
    function: Callable[..., Tensor], case: tuple[int, int, int, torch.dtype, str], device: str
) -> None:
    length, group, kv_heads, dtype, packing = case
    inputs, grad = drifting(length, group, kv_heads, dtype, device)
    mask = selected(length, kv_heads, device, packing)
    exact = in_double(inputs, mask, grad)
    with poisoned_buffers():
        found = found_by(function, inputs, mask, grad)
    near = [x[:1] for x in inputs[:3]] + [x[:1].float() for x in inputs[3:]]  # float32 is enough where it begins at 0
    allowed = [errors(x, y[:1]) for x, y in zip(found_by(function, near, mask, grad[:1]), exact, strict=True)]
    for name, x, z, least in zip(NAMES, found, exact, allowed, strict=True):
        error = errors(x, z)
        print(f"{name}: {least.item():.2e} in float32 at 0; {', '.join(f'{e:.2e}' for e in error)}")
        assert x.dtype == (torch.float64 if "bias" in name else dtype), name
        assert (error <= 2 * torch.maximum(error[0], least)).all(), name
        assert (error <= 2 * least + torch.finfo(dtype).eps * z.abs().max()).all(), name


def test_float32_biases_would_not_do(device: str) -> None:
    """Else the tests here could not fail."""
    inputs, grad = drifting(63, 2, 2, torch.float32, device)
    mask = selected(63, 2, device, "none")
    exact = in_double(inputs, mask, grad)
    found = found_by(segment_attention, [*inputs[:3], *(x.float() for x in inputs[3:])], mask, grad)
    for name, x, z in zip(NAMES[:5], found, exact, strict=False):
        error = errors(x, z)
        assert (error[2:] > 1000 * error[0]).all(), name


@pytest.mark.parametrize(
    ("function", "dtype", "length"),
    [(segment_attention, torch.bfloat16, 2048), (fused_attention, torch.float16, 2048 if ON_GPU else 300)],
    ids=named,
)
def test_gradients_of_gates_far_into_a_text(
    function: Callable[..., Tensor], dtype: torch.dtype, length: int, device: str
) -> None:
    """A gate lowers all keys before it, so its gradient sums up those of all biases from it on."""
    (q, k, v, *_), grad = drifting(length, 2, 1, dtype, device, starts=(1e6,))
    content = torch.randn(1, 1, length, dtype=torch.float64, device=device)
    gates = torch.rand(1, 1, length, dtype=torch.float64, device=device) / 8
    mask = Lifetimes.sliding_window(length, 128, device)

    def of_gates(function: Callable[..., Tensor], *qkv: Tensor) -> Tensor:
        steps = gates.clone().requires_grad_()
        drift = 1e6 + steps.cumsum(-1)
        out = function(*qkv, content + drift, mask, query_bias=-drift)
        return torch.autograd.grad(out, steps, grad.to(out.dtype))[0]

    exact = of_gates(segment_attention, *(x.double() for x in (q, k, v)))
    error = ((of_gates(function, q, k, v) - exact).norm() / exact.norm()).item()
    print(f"relative error {error:.2e}")
    assert error < 0.01


@pytest.mark.parametrize("function", [segment_attention, reference_attention])
def test_the_log_sum_exp_leaves_the_query_bias_out(function: Callable[..., Tensor], device: str) -> None:
    inputs, _ = drifting(111, 2, 2, torch.float32, device)
    mask = selected(111, 2, device, "padding")
    given = mask.to_dense() if function is reference_attention else mask

    def of(*x: Tensor) -> tuple[Tensor, ...]:
        x = tuple(y.detach().requires_grad_() for y in x)
        lse = function(*x[:4], given, return_lse=True, query_bias=x[4])[1]
        loss = (lse.where(lse.isfinite(), 0) * torch.linspace(0, 1, 111, device=device)).sum()
        return lse.detach(), *torch.autograd.grad(loss, (x[0], x[1], x[3]))

    found, exact = of(*inputs), of(*(x.double() for x in inputs))
    assert found[0].dtype == torch.float64
    assert torch.equal(found[0].isneginf(), exact[0].isneginf())  # padded queries see nothing
    for x, z in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double().nan_to_num(neginf=0), z.nan_to_num(neginf=0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("function", BACKENDS)
def test_infinities_and_nan(function: Callable[..., Tensor], device: str) -> None:
    (q, k, v, key_bias, query_bias), _ = drifting(40, 2, 1, torch.float32, device, starts=(100.0,))
    mask = Lifetimes.causal(40, device)

    def out_with(place: int, key: float | None = None, query: float | None = None) -> Tensor:
        biases = [key_bias.clone(), query_bias.clone()]
        for bias, value in zip(biases, (key, query), strict=True):
            if value is not None:
                bias[..., place] = value
        return over(function, mask)(q, k, v, *biases)

    plain = out_with(0)
    for value in (torch.nan, torch.inf):
        found = out_with(7, key=value)
        assert found[:, :, 7:].isnan().all()
        assert found[:, :, :7].isfinite().all()
    assert (out_with(7, key=-torch.inf) - out_with(7, key=-1e300)).abs().max() < 1e-5
    torch.testing.assert_close(out_with(7, key=1e300)[0, :, 7:], v[0, :, 7:8].expand(2, 33, -1))  # finite, not infinite
    for value in (torch.nan, torch.inf, -torch.inf):  # also where the segment begins
        for place in (0, 7):
            torch.testing.assert_close(out_with(place, query=value), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("function", BACKENDS)
def test_saturated_biases_are_no_preference_and_get_no_gradient(function: Callable[..., Tensor], device: str) -> None:
    (q, k, v, key_bias, query_bias), grad = drifting(40, 2, 1, torch.float32, device, starts=(100.0,))
    key_bias[..., :2] = torch.tensor([1e200, 3e38], dtype=torch.float64)
    out, *_, dkey_bias, dquery_bias = found_by(
        function, [torch.zeros_like(q), k, v, key_bias, query_bias], Lifetimes.causal(40, device), grad
    )
    torch.testing.assert_close(out[0, :, 1:], v[0, :, :2].mean(1, keepdim=True).expand(2, 39, -1))
    assert not dkey_bias[..., :2].any()
    assert dquery_bias.isfinite().all()


@pytest.mark.parametrize("function", BACKENDS)
def test_each_bias_may_have_its_own_dtype(function: Callable[..., Tensor], device: str) -> None:
    """The output depends on that of the key bias alone; gradients come back in those of their inputs."""
    (*qkv, key_bias, query_bias), grad = drifting(63, 2, 1, torch.float32, device, starts=(1e6,))
    mask = selected(63, 1, device, "none")
    exact, *_ = in_double([*qkv, key_bias, query_bias], mask, grad)
    out, *_, dkey_bias, dquery_bias = found_by(function, [*qkv, key_bias, query_bias.float()], mask, grad)
    assert (dkey_bias.dtype, dquery_bias.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)

    out, *_, dkey_bias, dquery_bias = found_by(function, [*qkv, key_bias.float(), query_bias], mask, grad)
    assert (dkey_bias.dtype, dquery_bias.dtype) == (torch.float32, torch.float64)
    given = mask.to_dense() if function is reference_attention else mask
    assert torch.equal(out, function(*qkv, key_bias.float(), given))
    assert torch.equal(function(*qkv, key_bias, given), function(*qkv, key_bias.float(), given))  # nothing to add first


def test_biases_in_slots_have_the_bits_of_the_plain_form(device: str) -> None:
    from dma_kernels.segments.gather_kernels import launch_gather_biases

    mask = Lifetimes.top_w(torch.randn(2, 3, 111, device=device), 20)
    slots = SegmentSlots.plain(mask, 2, 3, segment_length=32, block_size=16)
    bias, query_bias = (torch.randn(2, 111, 3, dtype=torch.float64, device=device).mT * 1e6 for _ in range(2))
    bias[..., 3], bias[..., 5], bias[..., 7], bias[..., 9] = torch.inf, torch.nan, 1e300, -3e38
    query_bias[0, :, 32], query_bias[1, :, 32], query_bias[0, :, 64] = torch.inf, torch.nan, -1e300
    for key_bias in (bias, bias.float()):
        for asked in (None, query_bias, query_bias.float()):
            with poisoned_buffers():
                found = launch_gather_biases(key_bias, asked, slots.copies.row, segment_length=32)
            expected = slots.gather_biases_plain(key_bias, asked)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_copies_are_summed_in_float64(device: str) -> None:
    from dma_kernels.segments.sum_kernels import launch_sum_key_gradients

    copies = SegmentSlots.plain(Lifetimes.causal(256, device), 1, 1, segment_length=1).copies  # key 0 has 256 copies
    dbias = torch.full(copies.row.shape, 1.0 + 2**-23, device=device)
    *_, total = launch_sum_key_gradients(
        *[dbias[..., None]] * 2, dbias, copies.first, copies.slot, shape=(1, 1, 256), wide=True
    )
    assert total[0, 0, 0] == 256 + 256 * 2**-23  # of which float32 holds not even 3 * (1 + 2**-23)
    expected = sum_copies_reference(dbias[..., None].double(), copies.row, [1, 1, 256, 1])
    assert torch.equal(total, expected.squeeze(-1))


def test_gradients_of_biases_are_sums_in_float64(device: str) -> None:
    """Over the copies of a key, and the heads that share a query's bias; float32 does not hold these."""
    inputs, grad = drifting(257, 3, 1, torch.float32, device, starts=(1e6,))
    grad = grad * 2.0 ** torch.tensor([0, -20, -40], device=device)[:, None, None]  # heads without a common last bit
    attention = partial(fused_attention, segment_length=128)
    found = found_by(attention, inputs, Lifetimes.sliding_window(257, 200, device), grad)
    for name, x in zip(NAMES[-2:], found[-2:], strict=True):
        assert (x != x.float()).any(), name


def test_compiled_equals_eager(device: str) -> None:
    inputs, grad = drifting(40, 2, 1, torch.float32, device, starts=(1e6,))
    mask = Lifetimes.sliding_window(40, 9, device)
    for function in (fused_attention, segment_attention):
        attention = over(function, mask)
        compiled = torch.compile(attention, fullgraph=True, backend="inductor" if ON_GPU else "eager")
        found, expected = (
            results(lambda *x, function=function: function(*x[:-1]), inputs, grad, grad)
            for function in (compiled, attention)
        )
        for name, x, y in zip(NAMES, found, expected, strict=True):
            assert x.dtype == y.dtype, name
            # Computed in float32, whatever dtype the gradients of biases have.
            torch.testing.assert_close(x.float(), y.float(), msg=lambda text, name=name: f"{name}: {text}")


def test_operations_are_registered_as_torch_expects(device: str) -> None:
    inputs, _ = drifting(40, 2, 1, torch.float32, device, starts=(1e6,))
    slots = SegmentSlots.of(Lifetimes.sliding_window(40, 9, device), 1, 1)
    tensors = (slots.copies.row, slots.copies.first, slots.copies.slot, slots.birth, slots.death)
    tests, sizes = ("test_schema", "test_faketensor"), (slots.segment_length, 0.25)
    biases = (slots.fill_up(inputs[3]), inputs[4], slots.copies.row, slots.segment_length)
    torch.library.opcheck(torch.ops.dma_kernels.gather_biases, biases, test_utils=tests)
    forward = (*inputs[:4], *tensors, *sizes, inputs[4])
    torch.library.opcheck(torch.ops.dma_kernels.attend_slots, forward, test_utils=tests)
    out, lse, *by_slot = torch.ops.dma_kernels.attend_slots(*forward)
    torch.library.opcheck(
        torch.ops.dma_kernels.attend_slots_backward, (out, inputs[0], *by_slot, out, lse, *tensors[1:], *sizes),
        {"query_bias": True, "wide": True}, test_utils=tests,
    )  # fmt: skip
