"""Attention to chosen blocks by Triton kernels equals its plain reference, in output and gradients."""

import itertools

import pytest
import torch
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels.selected_blocks import tiles as block_tiles
from dma_kernels.selected_blocks.attention import block_attention, block_attention_reference
from dma_kernels.selected_blocks.tiles import find_choosers, make_tiles

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
SIZES = [(1, 16, 1), (63, 16, 3), (111, 32, 2), (150, 64, 9)]  # length, block size, blocks of a query
GROUPED = list(itertools.product(SIZES, [1, 2, 16]))
if not ON_GPU:  # the interpreter is slow: every size, most with two groups
    GROUPED = list(zip([*SIZES, *SIZES[:2], SIZES[3]], [1, 1, 2, 3, 2, 3, 1], strict=True))


def choose(batch: int, kv_heads: int, length: int, block_size: int, count: int, device: str) -> Tensor:
    """Distinct random blocks up to each query's own. All have the first block. Missing ones are -1."""
    number = -(-length // block_size)
    own = torch.arange(length, device=device)[:, None] // block_size
    block = torch.arange(number, device=device)
    chance = torch.rand(batch, kv_heads, length, number, device=device) + 2 * (block == 0)
    chosen = chance.masked_fill(block > own, -1).topk(min(count, number), dim=-1)
    return chosen.indices.masked_fill(chosen.values < 0, -1)


def make_inputs(length: int, group: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k and v, none of them contiguous, which require gradients."""
    shapes = [(2, length, heads, head_dim) for heads in (2 * group, 2, 2)]
    return [torch.randn(x, device=device).to(dtype).transpose(1, 2).requires_grad_() for x in shapes]


def check(
    inputs: list[Tensor], blocks: Tensor, first: Tensor, padding: Tensor | None, block_size: int, tolerance: float
) -> None:
    """Compare output and gradients with the reference in float64."""
    length, device = inputs[0].shape[2], inputs[0].device
    with poisoned_buffers():
        out = block_attention(*inputs, blocks, first, padding, block_size)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    pads = torch.zeros(2, length, dtype=torch.bool, device=device) if padding is None else padding
    position = torch.arange(length, device=device)
    exact = block_attention_reference(*exact_inputs, blocks, position, first, pads, block_size)
    grad = torch.randn_like(out)
    with poisoned_buffers():
        found = torch.autograd.grad(out, inputs, grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for name, x, y in zip(("out", "dq", "dk", "dv"), (out, *found), (exact, *expected), strict=True):
        assert x.isfinite().all(), name
        error = (x.double() - y).norm() / y.norm().clamp(min=0.5 * y.numel() ** 0.5)  # of one key dq and dk are 0
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [20, 128] if ON_GPU else [20])
@pytest.mark.parametrize(("size", "group"), GROUPED, ids=str)
def test_equals_the_reference(
    size: tuple[int, int, int], group: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    length, block_size, count = size
    blocks = choose(2, 2, length, block_size, count, device)
    first = torch.zeros(2, length, dtype=torch.long, device=device)
    inputs = make_inputs(length, group, head_dim, dtype, device)
    check(inputs, blocks, first, None, block_size, 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_documents_padding_and_chunks(chunk: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_tiles, "_CHUNK", chunk)
    blocks = choose(2, 2, 60, 16, 4, device)
    position = torch.arange(60, device=device)
    border = torch.tensor([[37], [50]], device=device)  # another one in each row
    first = torch.where(position < border, 0, border)
    padding = torch.rand(2, 60, device=device) < 0.3
    padding[1, :20] = True  # some queries see nothing
    check(make_inputs(60, 2, 16, torch.float32, device), blocks, first, padding, 16, 1e-5)


def test_tiles_and_choosers_hold_every_choice_once(device: str) -> None:
    blocks = choose(1, 2, 53, 16, 3, device)
    tiles = make_tiles(blocks, 2, 4)
    choices = []
    for z, rows in enumerate(tiles.block.tolist()):
        for tile, row in enumerate(rows):
            count = tiles.count[z, tile].item()
            assert row[:count] == sorted(set(row[:count]))
            assert set(row[count:]) <= {4}
            for entry in range(count):
                bits = tiles.bits[z, tile, entry].item()
                choices += [(z, tile * 8 + i, row[entry]) for i in range(8) if bits >> i & 1]
    expected = [
        (z, t, block)
        for z, rows in enumerate(blocks[0].tolist())
        for t, row in enumerate(rows)
        for block in row
        if block >= 0
    ]
    assert sorted(choices) == sorted(expected)
    choosers = find_choosers(tiles, 4)
    again = []
    for z in range(2):
        for block, start, end in zip(*(x[z].tolist() for x in choosers[2:5]), strict=True):
            if block < 4:
                for tile, bits in zip(*(x[z, start:end].tolist() for x in choosers[:2]), strict=True):
                    again += [(z, tile * 8 + i, block) for i in range(8) if bits >> i & 1]
    assert sorted(again) == sorted(expected)


def test_what_the_kernels_cannot_do_is_an_error(device: str) -> None:
    inputs = make_inputs(20, 1, 16, torch.float32, device)
    first = torch.zeros(2, 20, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"blocks of .* bytes, got 8 tokens"):
        block_attention(*inputs, choose(2, 2, 20, 8, 2, device), first, None, 8)
    blocks = choose(2, 2, 20, 16, 2, device)
    for wrong, message in (
        ((blocks[:, :1], first, None), r"blocks: expected torch.int64 \[2, 2, 20, 2\]"),
        ((blocks[:, :, :9], first, None), "blocks: expected"),
        ((blocks, first[:1], None), r"first: expected torch.int64 \[2, 20\]"),
        ((blocks, first, first), r"padding: expected torch.bool \[2, 20\]"),
    ):
        with pytest.raises(ValueError, match=message):
            block_attention(*inputs, *wrong, 16)
    with pytest.raises(ValueError, match="k: expected"):
        block_attention(inputs[0][:, :, :9], *inputs[1:], blocks, first, None, 16)
    twice = torch.cat([blocks[..., :1]] * 2, dim=-1)
    once = block_attention(*inputs, blocks[..., :1], first, None, 16)
    assert torch.equal(block_attention(*inputs, twice, first, None, 16), once)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        block_attention(*(x.double() for x in inputs), choose(2, 2, 20, 16, 2, device), first, None, 16)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_same_bits_in_every_run(device: str) -> None:
    inputs = make_inputs(3000, 2, 128, torch.bfloat16, device)
    blocks, first = choose(2, 2, 3000, 64, 16, device), torch.zeros(2, 3000, dtype=torch.long, device=device)
    runs = []
    for _ in range(2):
        out = block_attention(*inputs, blocks, first, None, 64)
        runs.append([out, *torch.autograd.grad(out.float().sin().sum(), inputs)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
