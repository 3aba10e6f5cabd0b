"""Triton kernels equal their plain-PyTorch references: on a GPU if there is one, else under Triton's interpreter."""

import math

import pytest
import torch
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels import Lifetimes, SegmentSlots
from dma_kernels.attention.key_gradients import key_gradients_reference
from dma_kernels.segments.gather import gather_rows_reference, sum_copies_reference

pytest.importorskip("triton")
from dma_kernels.attention.kernels.key_gradients import launch_key_gradients
from dma_kernels.segments.gather_kernels import launch_gather_keys, launch_gather_rows
from dma_kernels.segments.sum_kernels import launch_sum_copies, launch_sum_key_gradients

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
GROUPS, HEAD_DIMS = ([1, 2, 4, 8], [16, 20, 64, 96, 128, 256]) if ON_GPU else ([1, 4], [16, 18])


def make_slots(length: int, device: str, kv_heads: int = 2, **arguments: Tensor) -> SegmentSlots:
    """Segments of 32 positions for two sequences, with keys that live in several of them."""
    mask = Lifetimes.top_w(torch.randn(2, kv_heads, length, device=device), 20, **arguments)
    return SegmentSlots.plain(mask, 2, kv_heads, segment_length=32, block_size=16)


@pytest.mark.parametrize("head_dim", [1, 5, 16, 128])
@pytest.mark.parametrize("length", [1, 63, 111, 257])
def test_gather_and_its_transpose(length: int, head_dim: int, device: str) -> None:
    slots = make_slots(length, device)
    copies, shape = slots.copies, [2, 2, slots.filled_length, head_dim]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, length, 2, head_dim, device=device, dtype=dtype).transpose(1, 2)  # not contiguous
        with poisoned_buffers():
            rows = launch_gather_rows(slots.fill_up(x), copies.row)
            total = launch_sum_copies(rows, copies.first, copies.slot, shape=shape)
        assert torch.equal(rows, gather_rows_reference(slots.fill_up(x), copies.row))
        torch.testing.assert_close(total, sum_copies_reference(rows, copies.row, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "kv_heads", "head_dim"), [(1, 1, 1), (63, 3, 5), (257, 2, 16), (111, 1, 128)])
def test_gather_of_keys(length: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Keys, values and biases at once, each with strides of its own, and empty slots."""
    padding = torch.rand(2, length, device=device) < 0.2
    slots = make_slots(length, device, kv_heads, padding=padding)
    row = slots.copies.row
    assert (row < 0).any()
    k = torch.randn(2, length, kv_heads, head_dim, device=device).to(dtype).transpose(1, 2)
    v = torch.randn(2, kv_heads, head_dim, length, device=device).to(dtype).mT
    bias, query_bias = (torch.randn(2, length, kv_heads, dtype=torch.float64, device=device).mT * 1e6 for _ in range(2))
    bias[:, :, length // 2] = 3e38  # saturates
    for key_bias, asked in ((bias.float(), query_bias), (bias, None), (bias, query_bias), (bias, query_bias.float())):
        with poisoned_buffers():
            found = launch_gather_keys(k, v, key_bias, asked, row, segment_length=slots.segment_length)
        expected = [gather_rows_reference(slots.fill_up(x), row) for x in (k, v)]
        bias_by_slot = slots.gather_biases_plain(key_bias, asked)
        expected += [bias_by_slot, bias_by_slot * math.log2(math.e)]
        assert expected[-1].isfinite().all()
        for name, x, y in zip(("k", "v", "bias", "bias in base 2"), found, expected, strict=True):
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "kv_heads", "head_dim"), [(1, 1, 1), (63, 3, 5), (257, 2, 16), (111, 1, 128)])
def test_sums_of_key_gradients(length: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """The three sums at once have the bits of each by itself."""
    slots = make_slots(length, device, kv_heads, padding=torch.rand(2, length, device=device) < 0.2)
    copies, filled = slots.copies, slots.filled_length
    dk, dv = torch.randn(2, *copies.row.shape, head_dim, device=device).to(dtype)
    dbias = torch.randn(copies.row.shape, device=device)
    each = [
        launch_sum_copies(x, copies.first, copies.slot, shape=[2, kv_heads, filled, x.shape[-1]])[:, :, :length]
        for x in (dk, dv, dbias[..., None])
    ]
    double = sum_copies_reference(dbias[..., None].double(), copies.row, [2, kv_heads, filled, 1])[:, :, :length]
    for wide, dbias_alone in ((False, each[2]), (True, double)):
        with poisoned_buffers():
            found = launch_sum_key_gradients(
                dk, dv, dbias, copies.first, copies.slot, shape=(2, kv_heads, length), wide=wide
            )
        for name, x, y in zip(("dk", "dv"), found[:2], each[:2], strict=True):
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name
        torch.testing.assert_close(found[2], dbias_alone.squeeze(-1), rtol=1e-15 if wide else 0, atol=0)


def test_copies_are_summed_in_float32(device: str) -> None:
    mask = Lifetimes.causal(256, device)
    copies = SegmentSlots.plain(mask, 1, 1, segment_length=1).copies  # key 0 has 256 copies
    rows = torch.full((*copies.row.shape, 1), 1.0 + 2**-7, dtype=torch.bfloat16, device=device)
    total = launch_sum_copies(rows, copies.first, copies.slot, shape=[1, 1, 256, 1])
    assert total[0, 0, 0, 0] == 256 * (1.0 + 2**-7)  # a running sum in bfloat16 stops growing at 256


def make_inputs(slots: SegmentSlots, group: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Arguments of `key_gradients`, with the matching log-sum-exp."""
    birth, death = slots.birth, slots.death
    (z, kv_heads, keys), device, queries = birth.shape, birth.device, slots.segment_length
    q, grad_out = torch.randn(2, z, queries, kv_heads * group, head_dim, device=device).transpose(2, 3)
    k, v = torch.randn(2, z, kv_heads, keys, head_dim, device=device)
    q, k, v, grad_out = (x.to(dtype) for x in (q, k, v, grad_out))  # q and grad_out: not contiguous
    bias, scale = torch.randn(z, kv_heads, keys, device=device), head_dim**-0.5
    bias[:, :, -queries] = -torch.inf  # the first own key: for some query it is the only one
    logits = q.float() @ k.float().repeat_interleave(group, 1).mT * scale + bias.repeat_interleave(group, 1)[:, :, None]
    lse = logits.masked_fill(~slots.visible().repeat_interleave(group, 1), -torch.inf).logsumexp(-1)
    return [q, k, v, bias, birth, death, lse, torch.randn_like(lse), grad_out, scale]


def launch_in_base_2(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Launch the kernel, which takes the log-sum-exp in base 2."""
    *tensors, scale = inputs
    return launch_key_gradients(*tensors[:6], tensors[6] * math.log2(math.e), *tensors[7:], scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("length", [1, 63, 257])
def test_key_gradients(length: int, group: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    padding = torch.zeros(2, length, dtype=torch.bool, device=device)
    padding[1] = True  # all queries of a sequence without keys
    inputs = make_inputs(make_slots(length, device, padding=padding), group, head_dim, dtype)
    exact = key_gradients_reference(
        *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
    )
    with poisoned_buffers():
        found = launch_in_base_2(inputs)
    # P and dS are rounded to `dtype` once, and P has the error of its exponent, of which lse is the largest part.
    largest = inputs[6].nan_to_num(neginf=0).abs().max()
    tolerance = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * largest
    for name, x, y in zip(("dk", "dv", "dbias"), found, exact, strict=True):
        assert x.isfinite().all(), name
        error = (x.double() - y).norm() / y.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_key_gradients_are_the_same_bits_in_every_run(device: str) -> None:
    inputs = make_inputs(make_slots(1025, device), 4, 64, torch.bfloat16)
    first, second = launch_in_base_2(inputs), launch_in_base_2(inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
