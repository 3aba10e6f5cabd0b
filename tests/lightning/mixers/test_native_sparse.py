"""Native sparse attention against its definition, in loops over tokens, and against another implementation."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dma_kernels.ranks import ordered_bits
from dma_kernels.selected_blocks.attention import block_attention_reference
from dma_lightning import DogeForCausalLM, ModelConfig, NativeSparseAttention
from dma_lightning.mixers import native_sparse
from dma_lightning.mixers.native_sparse_blocks import BlockGrid
from dma_lightning.mixers.position_cache import PositionCache
from dma_lightning.mixers.sdpa import masked_attention
from dma_lightning.rotary import apply_rope

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SIZES = [  # l, s, b, count, window, length
    (8, 4, 8, 4, 5, 61),
    (8, 8, 8, 5, 16, 64),  # blocks do not overlap
    (4, 2, 8, 3, 1, 47),  # no block but the forced ones
    (8, 4, 16, 100, 7, 63),  # more blocks than there are
    (16, 4, 4, 6, 3, 50),  # compressed blocks longer than selected ones
    (32, 16, 64, 4, 8, 20),  # no block is whole
]


def make_module(sizes: tuple[int, ...], separate: bool) -> NativeSparseAttention:
    block, stride, select, count, window, _ = sizes
    module = NativeSparseAttention(
        hidden_size=24, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, nsa_compress_block=block,
        nsa_compress_stride=stride, nsa_compress_hidden=12, nsa_select_block=select, nsa_select_count=count,
        nsa_window=window, nsa_separate_kv=separate, backend="torch",
    ).double()  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return module


def softmax_over(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weights of one query `[D]` over keys `[K, D]`; 0 without keys."""
    weights = (k @ q * HEAD_DIM**-0.5).softmax(0)
    return weights @ v if len(k) else torch.zeros_like(q), weights


def by_definition(module: NativeSparseAttention, x: Tensor) -> tuple[Tensor, list[list[set[int]]]]:
    """The output for one sequence `[N, C]`, token by token, and the blocks that each query of each KV head chooses."""
    length, grid = len(x), module.grid
    block, stride, size = grid.compress_block, grid.compress_stride, grid.select_block
    separate = len(module.extra_k_proj) > 0

    def keys_and_values(kind: str) -> tuple[Tensor, Tensor]:
        own = separate and kind != "select"
        k_proj, v_proj, norm = (
            (module.extra_k_proj[kind], module.extra_v_proj[kind], module.extra_k_norm[kind])
            if own
            else (module.k_proj, module.v_proj, module.k_norm)
        )
        k, v = (proj(x).view(length, KV_HEADS, HEAD_DIM).transpose(0, 1) for proj in (k_proj, v_proj))
        return norm(k), v

    def rotate(y: Tensor, positions: Tensor | None = None) -> Tensor:
        return apply_rope(y[None], 1e4, positions)[0]

    q = rotate(module.q_norm(module.q_proj(x).view(length, HEADS, HEAD_DIM)).transpose(0, 1))
    gates = module.gate_proj(x).sigmoid().view(length, 3, HEADS)
    plain_k, plain_v = keys_and_values("compress")
    (k_select, v_select), (k_window, v_window) = keys_and_values("select"), keys_and_values("window")
    k_select, k_window = rotate(k_select), rotate(k_window)
    starts = [i for i in range(0, length, stride) if i + block <= length]
    out, chosen = torch.zeros(length, HEADS, HEAD_DIM, dtype=x.dtype), []
    for t in range(length):
        chosen.append([])
        for g in range(KV_HEADS):
            seen = [i for i in starts if i + block - 1 <= t]
            k_c, v_c = torch.zeros(0, HEAD_DIM, dtype=x.dtype), torch.zeros(0, HEAD_DIM, dtype=x.dtype)
            if seen:
                k_c, v_c = (
                    torch.stack([m.network((y[g, i : i + block] + m.places).flatten()) for i in seen])
                    for m, y in ((module.compress_k, plain_k), (module.compress_v, plain_v))
                )
                k_c = rotate(k_c[None], torch.tensor([seen]))[0]
            heads = range(g * HEADS // KV_HEADS, (g + 1) * HEADS // KV_HEADS)
            compressed = [softmax_over(q[h, t], k_c, v_c) for h in heads]
            own = t // size
            importance = dict.fromkeys(range(own + 1), 0.0)
            for _, weights in compressed:
                for i, weight in zip(seen, weights.tolist(), strict=True):
                    for token in range(i, i + block):
                        if token // size in importance:
                            importance[token // size] += weight / stride
            forced = {0, own, max(0, own - 1)}
            rounded = {j: ordered_bits(torch.tensor(value)).item() for j, value in importance.items()}
            order = sorted(rounded, key=lambda j, forced=forced, rounded=rounded: (j in forced, rounded[j], j))
            best = order[-grid.select_count :]
            chosen[-1].append(set(best))
            tokens = [u for j in sorted(best) for u in range(j * size, min((j + 1) * size, t + 1))]
            near = range(max(0, t - module.window + 1), t + 1)
            for h, (o_compressed, _) in zip(heads, compressed, strict=True):
                branches = (
                    o_compressed,
                    softmax_over(q[h, t], k_select[g, tokens], v_select[g, tokens])[0],
                    softmax_over(q[h, t], k_window[g, near], v_window[g, near])[0],
                )
                out[t, h] = sum(gates[t, i, h] * branch for i, branch in enumerate(branches))
    return module.o_proj(out.flatten(1)), chosen


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_its_definition(sizes: tuple[int, ...], separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make_module(sizes, separate), torch.randn(2, sizes[-1], 24, dtype=torch.float64)
    expected = [by_definition(module, row) for row in x]
    chosen, choose = [], BlockGrid.choose

    def recording(*arguments: object) -> Tensor:
        chosen.append(choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(BlockGrid, "choose", recording)
    for gathered in (1 << 25, 1):  # all queries at once, and 16 at a time
        monkeypatch.setattr(native_sparse, "_GATHERED", gathered)
        chosen.clear()
        torch.testing.assert_close(module(x), torch.stack([out for out, _ in expected]), rtol=1e-10, atol=1e-10)
        for b, blocks in enumerate(torch.cat(chosen, dim=2).tolist()):
            for g, of_head in enumerate(blocks):
                assert [set(row) - {-1} for row in of_head] == [of_query[g] for of_query in expected[b][1]]


def test_gradients_do_not_depend_on_how_queries_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make_module(SIZES[0], True), torch.randn(2, 61, 24, dtype=torch.float64)
    results = []
    for gathered in (1 << 25, 1):
        monkeypatch.setattr(native_sparse, "_GATHERED", gathered)
        results.append(torch.autograd.grad(module(x).sin().sum(), [*module.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU under Triton's interpreter, with documents and padding."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = make_module((8, 4, 16, 3, 5, 70), True).float().to(device)
    x = torch.randn(2, 70, 24, device=device)
    documents = (torch.arange(70, device=device) >= 40).long().expand(2, -1)
    padding = torch.zeros(2, 70, dtype=torch.bool, device=device)
    padding[1, :9] = True
    results = []
    for backend in ("torch", "triton"):
        module.backend = backend
        out = module(x, documents, padding)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*module.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("block", "stride", "size"), [(32, 16, 64), (8, 4, 8), (8, 8, 8), (16, 4, 4), (4, 4, 12)])
def test_importance_is_that_of_the_paper(block: int, stride: int, size: int) -> None:
    """Equation 9 of arXiv 2502.11089 with blocks counted from 0 instead of 1."""
    grid = BlockGrid(block, stride, size, 4)
    weights = grid.importance(torch.eye(grid.compressed(10 * size)), 10 * size)
    expected = torch.zeros_like(weights)
    for j in range(weights.shape[1]):
        for m in range(size // stride):
            for n in range(block // stride):
                i = size // stride * (j + 1) - 1 - m - n
                if 0 <= i < len(weights):
                    expected[i, j] += 1
    assert torch.equal(weights, expected)
    if (block, stride, size) == (32, 16, 64):
        assert weights[:, 2].nonzero().flatten().tolist() == [7, 8, 9, 10, 11]
        assert weights[7:12, 2].tolist() == [1, 2, 2, 2, 1]


def test_without_overlap_importance_is_the_attention_itself() -> None:
    assert torch.equal(BlockGrid(8, 8, 8, 4).importance(torch.eye(5), 40), torch.eye(5))


def test_equal_blocks_are_chosen_from_the_end() -> None:
    """Keys of zeros make all blocks equally important."""
    places = PositionCache(1).place(80, None)
    zeros = torch.zeros(1, HEADS, 80, HEAD_DIM)
    blocks = BlockGrid(8, 8, 8, 5).choose(zeros, zeros[:, :KV_HEADS, :10], places.first_of(places), places, places)
    assert sorted(blocks[0, 0, 79].tolist()) == [0, 6, 7, 8, 9]


def test_numbers_of_flash_linear_attention() -> None:
    """Made by `naive_nsa_compression`, `_topk` and `_selection` of fla-org/flash-linear-attention, commit bc3b101d.

    There blocks do not overlap, and are compressed by their mean.
    """
    golden = json.loads((Path(__file__).parent / "golden_nsa.json").read_text())

    def wave(heads: int, frequency: float) -> Tensor:
        n = 80 * heads * HEAD_DIM
        x = (torch.arange(n, dtype=torch.float64) * frequency).sin() * 2
        return x.view(1, 80, heads, HEAD_DIM).transpose(1, 2)

    q, k, v = wave(HEADS, 0.7310585), wave(KV_HEADS, 1.2345679), wave(KV_HEADS, 0.3141593)
    k_mean, v_mean = (x.unflatten(2, (10, 8)).mean(3) for x in (k, v))
    places, grid = PositionCache(1).place(80, None), BlockGrid(8, 8, 8, 5)
    compressed = masked_attention(q, k_mean, v_mean, grid.sees_compressed(places, places))
    blocks = grid.choose(q, k_mean, places.first_of(places), places, places)
    arguments = (blocks, places.position, places.first_of(places), places.padding, 8)
    selected = block_attention_reference(q, k, v, *arguments)
    assert blocks[0].sort(-1).values.transpose(0, 1).tolist() == golden["blocks"]
    for out, name in ((compressed, "compressed"), (selected, "selected")):
        found = out[0].transpose(0, 1)[golden["rows"]].float()
        torch.testing.assert_close(found, torch.tensor(golden[name]), rtol=1e-4, atol=1e-5)


def test_places_begin_with_the_range_of_the_model() -> None:
    for std in (0.02, 0.5):
        model = DogeForCausalLM(ModelConfig(attention="nsa", initializer_range=std, nsa_compress_block=64, head_dim=64))
        places = model.layers[0].self_attn.compress_k.places
        assert places.std().item() == pytest.approx(std, rel=0.1)
