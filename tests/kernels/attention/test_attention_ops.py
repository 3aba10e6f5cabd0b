"""Attention by Triton kernels equals the float64 definition: on a GPU if there is one, else under the interpreter."""

import importlib
import itertools

import masks
import pytest
import torch
from covering import covering
from exactness import NAMES, assert_as_exact_as_plain, results
from large_tiles import enlarge_attention_tiles
from poison import poisoned_buffers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dma_kernels import DynamicMaskCache, Lifetimes, SegmentSlots, fused_attention, segment_attention
from dma_kernels.attention.configs import KernelConfig
from dma_kernels.attention.kernels import backward
from dma_kernels.selected_blocks.attention import block_attention

ON_GPU = torch.cuda.is_available()
KV_HEADS = 2
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
LENGTHS = [1, 63, 111, 257, 1025 if ON_GPU else 385]  # tiles under the interpreter have 128 rows and 128 columns
WINDOWS, GROUPS = [1, 7, "N", "N + 5"], [1, 2, 3, 4, 8]
CASES = [masks.Case(), masks.Case(documents=True), masks.Case(padding="between", keep_last=2, sinks=1)]
CASES += [masks.Case(documents=True, padding="left")]
RANKS, HEAD_DIMS = ["random", "ties", "up", "down"], [5, 32, 64, 96, 128, 256]
SEGMENTS = [None, 32]  # the default, and so short that most keys are in a snapshot
# Under the interpreter every pair of values; on a GPU all masks, with every pair of the rest.
FEW = covering(LENGTHS, WINDOWS, GROUPS, CASES, RANKS, HEAD_DIMS, SEGMENTS)
REST = covering(RANKS, HEAD_DIMS, SEGMENTS)
ALL = [(*mask, *REST[i % len(REST)]) for i, mask in enumerate(itertools.product(LENGTHS, WINDOWS, GROUPS, CASES))]


@pytest.fixture(autouse=True)
def _large_tiles_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        enlarge_attention_tiles(monkeypatch)
        monkeypatch.setattr("dma_kernels.segments.gather_kernels._TILE", 1 << 17)


def make_ranks(kind: str, batch: int, length: int, device: str, kv_heads: int = KV_HEADS) -> Tensor:
    """`[B, G, N]`, not contiguous."""
    ranks = torch.randn(batch, length, kv_heads, device=device).transpose(1, 2) / 2
    if kind == "ties":
        return (3 * ranks).round() / 3
    slope = {"random": 0.0, "up": 3.0, "down": -3.0}[kind]
    return ranks + torch.linspace(0, slope, length, device=device)


def make_inputs(
    length: int, group: int, head_dim: int, device: str, batch: int = 2, kv_heads: int = KV_HEADS
) -> list[Tensor]:
    """q, k, v and the gradient of the output, not contiguous, as a projection leaves them."""
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    return [torch.randn(batch, length, h, head_dim, device=device).transpose(1, 2) for h in heads]


def make_mask(ranks: Tensor, window: int | str, case: masks.Case) -> Lifetimes:
    """A dynamic mask of the ranks' length."""
    batch, _, length = ranks.shape
    arguments = {
        name: x.to(ranks.device) if isinstance(x, Tensor) else x for name, x in case.arguments(batch, length).items()
    }
    window = {"N": length, "N + 5": length + 5}.get(window, window)
    return Lifetimes.top_w(ranks, window, **arguments)


def attend(mask: Lifetimes, segment: int | None, inputs: list[Tensor]) -> Tensor:
    """The attention under test, over short segments on request."""
    q, k = inputs[:2]
    if segment is None:
        return fused_attention(*inputs, mask)
    slots = SegmentSlots.of(mask, q.shape[0], k.shape[1], segment, block_size=32)
    return fused_attention(*inputs, mask, slots=slots)


@pytest.mark.parametrize(
    ("length", "window", "group", "case", "kind", "head_dim", "segment"), ALL if ON_GPU else FEW, ids=str
)
def test_equals_the_definition(
    length: int, window: int | str, group: int, case: masks.Case, kind: str, head_dim: int, segment: int | None,
    device: str,
) -> None:  # fmt: skip
    batch, kv_heads = 2, KV_HEADS
    if not ON_GPU and length > 100:  # the interpreter is slow
        batch, kv_heads, segment = 1 + (case.padding == "between"), 1, segment and max(segment, length // 8)
    *qkv, grad = make_inputs(length, group, head_dim, device, batch, kv_heads)
    ranks = make_ranks(kind, batch, length, device, kv_heads)
    mask = make_mask(ranks, window, case)
    with poisoned_buffers():
        assert_as_exact_as_plain(lambda *x: attend(x[-1], segment, x[:-1]), [*qkv, ranks.exp()], mask, grad)


# The interpreter's tl.dot multiplies bfloat16 wrong, so it is refused there.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [20, 64, 128, 256] if ON_GPU else [20])
def test_half_precision(head_dim: int, dtype: torch.dtype, device: str) -> None:
    *qkv, grad = (x.to(dtype) for x in make_inputs(1000 if ON_GPU else 111, 2, head_dim, device))
    ranks = make_ranks("random", 2, grad.shape[2], device)
    mask = Lifetimes.top_w(ranks, 100, keep_last=3, sinks=2)
    assert_as_exact_as_plain(fused_attention, [*qkv, ranks.exp()], mask, grad)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", [4096, 8191])
def test_large_shapes(length: int, group: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    *qkv, grad = (x.to(dtype) for x in make_inputs(length, group, head_dim, device, batch=1))
    ranks = make_ranks("random", 1, length, device)
    assert_as_exact_as_plain(fused_attention, [*qkv, ranks.exp()], Lifetimes.top_w(ranks, 1024), grad)


@pytest.mark.parametrize("window", [200, 256, 300])
def test_own_keys_that_some_queries_of_a_tile_no_longer_see(window: int, device: str) -> None:
    """The first queries of a tile see a whole tile of own keys; its last ones do, too, if the window is long enough."""
    *qkv, grad = make_inputs(520, 2, 16, device, batch=1, kv_heads=1)
    inputs = [*qkv, torch.randn(1, 1, 520, device=device)]
    assert_as_exact_as_plain(fused_attention, inputs, Lifetimes.sliding_window(520, window, device), grad)


@needs_gpu
def test_the_same_bits_in_every_run(device: str) -> None:
    *qkv, grad = (x.bfloat16() for x in make_inputs(5000, 4, 128, device))
    ranks = make_ranks("random", 2, 5000, device)
    mask = Lifetimes.top_w(ranks, 512)
    first, second = (results(fused_attention, [*qkv, ranks.exp()], mask, grad) for _ in range(2))
    for name, x, y in zip(NAMES, first, second, strict=True):
        assert torch.equal(x, y), name


def test_a_row_whose_keys_all_start_in_a_later_tile(device: str) -> None:
    """Nobody is visible for the first 40 queries; the next ones see a key of the third tile."""
    *qkv, grad = make_inputs(111, 1, 32, device)
    padding = torch.zeros(2, 111, dtype=torch.bool, device=device)
    padding[:, :40] = True
    mask = Lifetimes.sliding_window(111, 50, padding=padding)
    inputs = [*qkv, torch.randn(2, KV_HEADS, 111, device=device)]
    with poisoned_buffers():
        assert_as_exact_as_plain(fused_attention, inputs, mask, grad)
        found = results(fused_attention, inputs, mask, grad)
    assert (found[0][:, :, :40] == 0).all()
    assert all((x[:, :, :40] == 0).all() for x in found[1:])


def test_nan_scores_reach_the_output(device: str) -> None:
    *qkv, _ = make_inputs(111, 2, 32, device)
    ranks = make_ranks("random", 2, 111, device)
    ranks[0, 0, 50] = torch.nan
    with torch.no_grad():
        out = fused_attention(*qkv, ranks, Lifetimes.top_w(ranks, 20))
    assert out[0, :2, 50:].isnan().all()
    assert out[0, :2, :50].isfinite().all()
    assert out[0, 2:].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_nan_in_q_k_and_v_reaches_the_output(which: int, device: str) -> None:
    *inputs, _ = make_inputs(111, 2, 32, device)
    inputs[which][0, 0, 50, 3] = torch.nan
    with torch.no_grad():
        out = fused_attention(*inputs, torch.zeros(2, 2, 111, device=device), Lifetimes.sliding_window(111, 20, device))
    queries = slice(50, 51) if which == 0 else slice(50, 70)
    assert out[0, 0, queries].isnan().any(-1).all()
    assert out[1].isfinite().all()
    assert out[0, -1].isfinite().all()


def test_minus_infinity_as_only_score_is_no_key(device: str) -> None:
    *qkv, grad = make_inputs(40, 1, 32, device)
    scores = torch.zeros(2, KV_HEADS, 40, device=device)
    scores[..., 0] = -torch.inf
    found = results(fused_attention, [*qkv, scores], Lifetimes.causal(40, device), grad)
    expected = results(segment_attention, [*qkv, scores], Lifetimes.causal(40, device), grad)
    for name, x, y in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=name)


def test_one_mask_for_all_sequences_and_heads(device: str) -> None:
    *qkv, grad = make_inputs(63, 2, 32, device)
    inputs = [*qkv, torch.randn(2, KV_HEADS, 63, device=device)]
    assert_as_exact_as_plain(fused_attention, inputs, Lifetimes.sliding_window(63, 9, device), grad)


def test_slots_serve_many_calls(device: str) -> None:
    *qkv, _ = make_inputs(63, 2, 32, device)
    inputs, mask = [*qkv, torch.randn(2, KV_HEADS, 63, device=device)], Lifetimes.sliding_window(63, 9, device)
    slots = SegmentSlots.of(mask, 2, KV_HEADS)
    with torch.no_grad():
        assert torch.equal(fused_attention(*inputs, mask, slots=slots), fused_attention(*inputs, mask))
    with pytest.raises(ValueError, match=r"slots: expected slots for .* got slots for batch 2, 2 KV heads"):
        fused_attention(*(x[:1] for x in inputs), mask, slots=slots)


def test_empty_batch(device: str) -> None:
    q, scores = torch.zeros(0, 2, 9, 16, device=device), torch.zeros(0, 2, 9, device=device)
    assert fused_attention(q, q, q, scores, Lifetimes.top_w(scores, 3)).shape == q.shape


@pytest.mark.parametrize("trained", range(4))
def test_each_gradient_alone(trained: int, device: str) -> None:
    *qkv, _ = make_inputs(40, 2, 16, device)
    inputs = [*qkv, torch.randn(2, KV_HEADS, 40, device=device)]
    inputs[trained].requires_grad_()
    mask = Lifetimes.top_w(inputs[3], 9)
    (found,) = torch.autograd.grad(fused_attention(*inputs, mask).sin().sum(), inputs[trained])
    (expected,) = torch.autograd.grad(segment_attention(*inputs, mask).sin().sum(), inputs[trained])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_operations_are_registered_as_torch_expects(device: str) -> None:
    """Fakes have the shapes and strides of the real results; autograd is there; nothing is mutated."""
    *qkv, _ = make_inputs(40, 2, 16, device)
    scores = torch.randn(2, KV_HEADS, 40, device=device)
    slots = SegmentSlots.of(Lifetimes.top_w(scores, 9), 2, KV_HEADS)
    inputs = [x.requires_grad_() for x in (*qkv, scores)]
    arguments = (slots.copies.row, slots.copies.first, slots.copies.slot, slots.birth, slots.death)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.dma_kernels.attend_slots, (*inputs, *arguments, slots.segment_length, 0.25), test_utils=tests
    )
    with torch.no_grad():
        out, lse, *by_slot = torch.ops.dma_kernels.attend_slots(*inputs, *arguments, slots.segment_length, 0.25)
    backward = (out, inputs[0].detach(), *by_slot, out, lse, *arguments[1:], slots.segment_length, 0.25)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dma_kernels.attend_slots_backward, backward, test_utils=tests)


def test_memory_of_the_backward_changes_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of one, two or three lines, in one or two halves, and all at once; with NaN in what is not written."""
    *qkv, grad = make_inputs(500, 2, 32, device)
    inputs = [*qkv, make_ranks("random", 2, 500, device)]
    mask, found = Lifetimes.top_w(inputs[3], 100), []
    for limit in (1, 600_000, 1_200_000, 1_700_000, 1 << 29):
        monkeypatch.setattr(backward, "ds_bytes", lambda limit=limit: limit)
        with poisoned_buffers():
            found.append(results(fused_attention, inputs, mask, grad))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("lines", "limit", "expected"),
    [
        (8, 800, (8, 1, 1)),  # all at once
        (8, 799, (3, 3, 2)),  # two parts of three in memory
        (64, 800, (4, 16, 2)),
        (9, 400, (2, 5, 2)),
        (8, 199, (1, 8, 1)),  # no room for two
        (8, 1, (1, 8, 1)),
    ],
)
def test_parts_of_the_backward(lines: int, limit: int, expected: tuple[int, int, int]) -> None:
    assert backward.cut_lines(lines, 100, limit) == expected


def test_query_gradients_may_have_narrower_tiles_of_keys(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *qkv, grad = make_inputs(300, 2, 32, device)
    inputs = [*qkv, make_ranks("random", 2, 300, device)]
    mask = Lifetimes.top_w(inputs[3], 60)
    expected = results(fused_attention, inputs, mask, grad)
    module = "dma_kernels.attention.kernels"
    monkeypatch.setattr(f"{module}.key_gradients.kernel_config", lambda *_: KernelConfig(64, 32, 4, 2))
    monkeypatch.setattr(f"{module}.query_gradients.kernel_config", lambda *_: KernelConfig(64, 16, 4, 2))
    with poisoned_buffers():
        found = results(fused_attention, inputs, mask, grad)
    for x, y in zip(found, expected, strict=True):
        assert ((x - y).norm() / y.norm()).item() < 4 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("said", ["0", "-1", "much", ""])
def test_memory_of_the_backward_is_a_number(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMA_KERNEL_BACKWARD_MIB", said)
    with pytest.raises(ValueError, match=r"DMA_KERNEL_BACKWARD_MIB: expected a whole number of MiB above 0, got"):
        backward.ds_bytes()


@needs_gpu
def test_compiled_equals_eager(device: str) -> None:
    *qkv, grad = make_inputs(700, 2, 64, device)
    ranks = make_ranks("random", 2, 700, device)

    def function(*x: Tensor) -> Tensor:
        inputs = x[:-1]
        return fused_attention(*(2 * y for y in inputs), Lifetimes.top_w(inputs[3], 100)).sin()

    eager = results(function, [*qkv, ranks], None, grad)
    compiled = results(torch.compile(function, fullgraph=True), [*qkv, ranks], None, grad)
    for name, x, y in zip(NAMES, compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=name)


@needs_gpu
def test_autocast_and_checkpointing_change_nothing() -> None:
    *qkv, _ = make_inputs(300, 2, 64, "cuda")
    inputs = [x.requires_grad_() for x in (*qkv, make_ranks("random", 2, 300, "cuda"))]
    mask = Lifetimes.top_w(inputs[3], 40)

    def loss(*x: Tensor) -> Tensor:
        return fused_attention(*x, mask).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss(*inputs), inputs)
    again = torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs)
    for x, y, z in zip(found, again, expected, strict=True):
        assert torch.equal(x, z)
        assert torch.equal(y, z)


@needs_gpu
def test_a_cuda_graph_captures_selection_forward_and_backward() -> None:
    *qkv, grad = (x.bfloat16() for x in make_inputs(2000, 4, 64, "cuda"))
    inputs = [x.requires_grad_() for x in (*qkv, make_ranks("random", 2, 2000, "cuda"))]

    def step() -> list[Tensor]:
        out = fused_attention(*inputs, Lifetimes.top_w(inputs[3], 256))
        return [out, *torch.autograd.grad(out, inputs, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x) / 2)
    graph.replay()
    for name, x, y in zip(NAMES, captured, step(), strict=True):
        assert torch.equal(x, y), name


@needs_gpu
@pytest.mark.skipif(ON_GPU and torch.cuda.mem_get_info()[1] < 60 << 30, reason="needs 60 GiB")
def test_more_than_2_to_the_31_elements(device: str) -> None:
    """The last of 1.1 million positions are what they are without all before: a window reaches 128 back."""
    length, window, tail = 1_100_000, 128, 600
    qkv = [torch.randn(1, length, h, 128, device=device, dtype=torch.bfloat16).transpose(1, 2) for h in (16, 2, 2)]
    inputs = [x.requires_grad_() for x in (*qkv, torch.randn(1, 2, length, device=device))]
    out = fused_attention(*inputs, Lifetimes.sliding_window(length, window, device))
    grad = torch.randn_like(out[:, :, -tail:])
    gradients = torch.autograd.grad(out[:, :, -tail:], inputs, grad)
    ends = [x.detach()[:, :, -2 * tail :].requires_grad_() for x in inputs]
    expected = segment_attention(*ends, Lifetimes.sliding_window(2 * tail, window, device))[:, :, -tail:]
    expected_gradients = torch.autograd.grad(expected, ends, grad)
    error = (out[:, :, -tail:] - expected).float().norm() / expected.float().norm()
    assert error < 2**-7  # both round to bfloat16
    for x, y in zip(gradients, expected_gradients, strict=True):
        assert (x[:, :, -2 * tail :] - y).float().norm() / y.float().norm() < 2**-6
        assert not x[:, :, : -2 * tail].any()


def test_gradients_that_are_expanded(device: str) -> None:
    """A mean over heads has a gradient of stride 0 over them."""
    *qkv, _ = make_inputs(40, 2, 16, device)
    inputs = [x.requires_grad_() for x in (*qkv, torch.randn(2, KV_HEADS, 40, device=device))]
    mask = Lifetimes.top_w(inputs[3], 9)
    weight = torch.randn(2, 40, 16, device=device)
    found, expected = (
        torch.autograd.grad((attend(*inputs, mask).mean(1) * weight).sum(), inputs)
        for attend in (fused_attention, segment_attention)
    )
    for name, x, y in zip(NAMES[1:], found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=name)


def test_bad_inputs(device: str) -> None:
    *qkv, _ = make_inputs(40, 2, 16, device)
    scores = torch.randn(2, KV_HEADS, 40, device=device)
    mask = Lifetimes.top_w(scores, 9)
    with pytest.raises(ValueError, match=r"'triton' computes in float32, bfloat16 or float16, got torch.float64"):
        fused_attention(*(x.double() for x in (*qkv, scores)), mask)
    with pytest.raises(ValueError, match=r"lifetimes: expected \[2 or 1, 2 or 1, 40\] .* got \[1, 1, 39\]"):
        fused_attention(*qkv, scores, Lifetimes.causal(39, device))
    with pytest.raises(ValueError, match=r"key_bias: expected torch\.float32"):
        fused_attention(*qkv, scores.bfloat16(), mask)
    with pytest.raises(ValueError, match="'triton' takes head dims up to 256, got 272"):
        fused_attention(*(torch.zeros(2, KV_HEADS, 40, 272, device=device),) * 3, scores, mask)
    with pytest.raises(ValueError, match="segment_length: expected at least 1, got 0"):
        fused_attention(*qkv, scores, mask, segment_length=0)
    assert SegmentSlots.of(mask, 2, KV_HEADS, segment_length=1 << 20).segment_length == 128
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: fused_attention(x, *qkv[1:], scores, mask), (qkv[0],), (qkv[0],))
    with pytest.raises(ValueError, match="block_size: expected a multiple of 16, got 8"):
        SegmentSlots.of(mask, 2, KV_HEADS, block_size=8)
    with pytest.raises(ValueError, match=r"slots: expected slots for .* and 39 positions"):
        fused_attention(*qkv, scores, mask, slots=SegmentSlots.of(Lifetimes.causal(39, device), 2, KV_HEADS))
    with pytest.raises(ValueError, match="born at its own position"):
        fused_attention(*qkv, scores, Lifetimes(mask.birth + 1, mask.death, 9))


def test_a_machine_that_cannot_names_the_backends_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    module = importlib.import_module("dma_kernels.attention.ops")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    q, scores = torch.zeros(1, 1, 9, 16), torch.zeros(1, 1, 9)
    with pytest.raises(ValueError, match=r"'triton' runs on CUDA, got tensors on cpu; use backend 'torch', or 'flex'"):
        fused_attention(q, q, q, scores, Lifetimes.causal(9))
    monkeypatch.setattr(module, "has_triton_package", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton; install it, or use backend 'flex' or 'torch'"):
        fused_attention(q, q, q, scores, Lifetimes.causal(9))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8.0 or newer, got \(7, 5\); use backend 'torch'"):
        module.check_machine(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("score", [torch.finfo(torch.float32).min, -3e38, 3e38])
def test_equal_scores_are_no_preference_however_large(score: float, device: str) -> None:
    *_, k, v, _ = make_inputs(40, 1, 16, device)
    scores, mask = torch.full((2, KV_HEADS, 40), score, device=device), Lifetimes.sliding_window(40, 7, device)
    with torch.no_grad():
        out = fused_attention(torch.zeros_like(k), k, v, scores, mask)
    share = mask.to_dense() / mask.to_dense().sum(-1, keepdim=True)
    torch.testing.assert_close(out, share @ v)


def test_scores_beyond_the_bound_get_no_gradient(device: str) -> None:
    q, k, v, _ = make_inputs(40, 1, 16, device)
    scores = torch.randn(2, KV_HEADS, 40, device=device)
    scores[:, :, 3], scores[:, :, 5] = 3e38, -3e38
    gradients = []
    for attend in (fused_attention, segment_attention):
        biases = scores.clone().requires_grad_()
        attend(q, k, v, biases, Lifetimes.sliding_window(40, 4, device)).square().sum().backward()
        gradients.append(biases.grad)
    assert gradients[0][:, :, [3, 5]].abs().max() == 0
    torch.testing.assert_close(*gradients)


def test_an_infinite_score_shows(device: str) -> None:
    *qkv, _ = make_inputs(40, 1, 16, device)
    scores = torch.zeros(2, KV_HEADS, 40, device=device)
    scores[:, :, 9] = torch.inf
    with torch.no_grad():
        out = fused_attention(*qkv, scores, Lifetimes.causal(40, device))
    assert out[:, :, 9:].isnan().all()


@pytest.mark.skipif(ON_GPU, reason="needs the interpreter")
def test_bfloat16_is_refused_under_the_interpreter(device: str) -> None:
    q, scores, mask = torch.zeros(1, 2, 20, 16).bfloat16(), torch.zeros(1, 2, 20), Lifetimes.causal(20)
    blocks, first = torch.zeros(1, 2, 20, 1, dtype=torch.int64), torch.zeros(1, 20, dtype=torch.int64)
    for refused in (
        lambda: fused_attention(q, q, q, scores, mask),
        lambda: block_attention(q, q, q, blocks, first, None, 16),
        lambda: DynamicMaskCache(1, 2, 16, 4, dtype=torch.bfloat16, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"interpreter computes in float32 or float16, got torch\.bfloat16; use"):
            refused()
