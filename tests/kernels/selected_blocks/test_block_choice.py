"""The Triton kernel chooses the same blocks as the plain code, which computes in float64 here."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels.packing import document_runs
from dma_kernels.selected_blocks.choice import (
    best_blocks,
    choose_blocks,
    choose_blocks_reference,
)
from dma_kernels.selected_blocks.grid import NO_BLOCK, NO_RUN, BlockSizes, Seen, sees_compressed

pytest.importorskip("triton")

from dma_kernels.selected_blocks.choice_kernels import launch_best_blocks

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
CASES = [  # l, s, b and count; length
    ((32, 16, 64, 4), 1),
    ((32, 16, 64, 4), 20),  # no block is whole
    ((32, 16, 64, 5), 460),
    ((8, 8, 8, 5), 257),  # blocks do not overlap
    ((4, 4, 12, 3), 63),  # no block but the forced ones
    ((8, 4, 8, 2), 63),  # fewer than the forced ones
    ((16, 4, 4, 6), 63),  # compressed blocks longer than selected ones
    ((8, 4, 16, 100), 111),  # more blocks than there are
]
GROUPS = [1, 2, 3, 16]
GROUPED = list(itertools.product([*CASES, ((32, 16, 64, 16), 5000)], GROUPS))
if not ON_GPU:  # the interpreter is slow
    GROUPED = list(zip(CASES, [1, 2, 2, 1, 4, 2, 3, 1], strict=True))
CLOSE = 2.0**-14  # importances are compared with 16 mantissa bits, and have an error in float32


def see(sizes: BlockSizes, documents: Tensor, padding: Tensor) -> Seen:
    """For each block, what queries of documents with ids `[B, N]` see of it."""
    runs = document_runs(documents, padding)
    begun = (~padding).cumsum(1) > 0
    runs = torch.where(begun, runs, -1)
    block_run = torch.full((len(runs), sizes.compressed(runs.shape[1])), NO_RUN, device=runs.device)
    first = torch.empty_like(runs)
    for b, row in enumerate(runs.tolist()):
        first[b] = torch.tensor([row.index(x) for x in row])
        for i in range(block_run.shape[1]):
            tokens = slice(i * sizes.compress_stride, i * sizes.compress_stride + sizes.compress_block)
            if len(set(row[tokens])) == 1 and not padding[b, tokens].any():
                block_run[b, i] = row[tokens][0]
    return Seen(runs, first, block_run)


def whole_row(sizes: BlockSizes, batch: int, length: int, device: str) -> Seen:
    """What queries see in rows with a single document and no padding."""
    none = torch.zeros(batch, length, dtype=torch.bool, device=device)
    return see(sizes, none.long(), none)


def make_inputs(sizes: BlockSizes, length: int, group: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Q and compressed keys of two KV heads, neither contiguous."""
    shapes = [(2, length, 2 * group, 20), (2, sizes.compressed(length), 2, 20)]
    q, k = (torch.randn(x, device=device).to(dtype).transpose(1, 2) for x in shapes)
    return q, k


def by_plain_code(q: Tensor, k: Tensor, seen: Seen, sizes: BlockSizes) -> Tensor:
    """The choice by the plain code, in the dtype of q."""
    position = torch.arange(q.shape[2], device=q.device)
    return choose_blocks_reference(q, k, position, seen, q.shape[2], sizes)


def exact_importance(q: Tensor, k: Tensor, seen: Seen, sizes: BlockSizes) -> Tensor:
    """Importance of each block for each query in float64, [B, G, N, Nb]; infinite for forced blocks, -1 for others."""
    position = torch.arange(q.shape[2], device=q.device)
    visible = sees_compressed(position, seen.run, seen.block_run, sizes)[:, :, None]
    logits = q.double().unflatten(1, (k.shape[1], -1)) @ k.double()[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0).sum(2)
    importance = sizes.importance(weights, q.shape[2])
    block, own = torch.arange(importance.shape[-1], device=q.device), position[:, None] // sizes.select_block
    first = (seen.first // sizes.select_block)[:, None, :, None]
    importance = importance.masked_fill((block == first) | (block >= own - 1), torch.inf)
    return importance.masked_fill((block < first) | (block > own), -1)


def check(found: Tensor, q: Tensor, k: Tensor, seen: Seen, sizes: BlockSizes) -> None:
    """Each chosen block is as good as the exact one of its place, and the same where blocks can be told apart."""
    expected, exact = by_plain_code(q.double(), k.double(), seen, sizes), exact_importance(q, k, seen, sizes)
    assert found.shape == expected.shape
    assert found.dtype == torch.int64
    assert torch.equal(found == NO_BLOCK, expected == NO_BLOCK)
    listed = found.sort(dim=-1).values
    assert not ((listed[..., 1:] == listed[..., :-1]) & (listed[..., 1:] != NO_BLOCK)).any()  # each block once
    values = [exact.gather(3, x.clamp(min=0)) for x in (found, expected)]
    torch.testing.assert_close(*values, rtol=CLOSE, atol=0)
    order = exact.sort(dim=-1, descending=True).values[..., : found.shape[-1] + 1]
    above, below = order[..., :-1], order[..., 1:]
    apart = (above - below > CLOSE * above) | (above == below) | above.isinf()  # equal ones are sums of the same
    clear = apart.all(-1)
    assert clear.float().mean() > 0.8
    assert torch.equal(found[clear], expected[clear])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "group"), GROUPED, ids=str)
def test_chooses_what_the_plain_code_chooses(
    case: tuple[tuple[int, ...], int], group: int, dtype: torch.dtype, device: str
) -> None:
    sizes, length = BlockSizes(*case[0]), case[1]
    q, k = make_inputs(sizes, length, group, dtype, device)
    seen = whole_row(sizes, 2, length, device)
    with poisoned_buffers():
        found = launch_best_blocks(q, k, seen, sizes)
    check(found, q, k, seen, sizes)


@pytest.mark.parametrize("sizes", [(8, 4, 8, 4), (8, 4, 16, 3), (16, 8, 8, 5)], ids=str)
def test_documents_and_padding(sizes: tuple[int, ...], device: str) -> None:
    grid = BlockSizes(*sizes)
    q, k = make_inputs(grid, 150, 2, torch.float32, device)
    documents = (torch.arange(150, device=device) >= torch.tensor([[67], [131]], device=device)).long()
    padding = torch.rand(2, 150, device=device) < 0.02
    padding[0, :21] = True  # these queries see nothing
    padding[1, 90:111] = True
    seen = see(grid, documents, padding)
    assert (seen.block_run == NO_RUN).any()
    with poisoned_buffers():
        found = launch_best_blocks(q, k, seen, grid)
    check(found, q, k, seen, grid)


def test_of_equal_blocks_the_later_is_chosen(device: str) -> None:
    """Keys of zeros make all blocks but the last ones equal; keys that repeat make those of a kind equal."""
    sizes = BlockSizes(8, 4, 8, 7)
    q, k = make_inputs(sizes, 161, 2, torch.float32, device)
    seen = whole_row(sizes, 2, 161, device)
    found = launch_best_blocks(q, torch.zeros_like(k), seen, sizes)
    assert torch.equal(found, by_plain_code(q, torch.zeros_like(k), seen, sizes))
    assert found[0, 0, 160].tolist() == [20, 19, 0, 18, 17, 16, 15]
    k = k[:, :, torch.arange(k.shape[2], device=device) % 4]  # each second selection block is the same
    found = launch_best_blocks(q, k, seen, sizes)
    assert torch.equal(found, by_plain_code(q, k, seen, sizes))
    kinds = found[:, :, 160, 3:] % 2  # after the forced ones
    assert (kinds == kinds[..., :1]).all()


def test_nan_is_the_largest_importance_and_stays_in_its_row(device: str) -> None:
    sizes = BlockSizes(8, 4, 8, 5)
    q, k = make_inputs(sizes, 90, 2, torch.float32, device)
    seen, clean = whole_row(sizes, 2, 90, device), launch_best_blocks(q, k, whole_row(sizes, 2, 90, device), sizes)
    q[0, 1, 70, 3] = k[1, 1, 15, 0] = torch.nan  # the key is seen from position 67 on
    found = launch_best_blocks(q, k, seen, sizes)
    assert torch.equal(found, by_plain_code(q, k, seen, sizes))
    changed = (found != clean).any(-1)
    assert not changed[0, 1].any()
    assert not changed[1, 0].any()
    assert not changed[1, 1, :67].any()
    assert changed[0, 0].nonzero().flatten().tolist() == [70]
    assert changed[1, 1, 67:].any()


@pytest.mark.parametrize(("batch", "length"), [(0, 40), (2, 0)])
def test_nothing_to_choose(batch: int, length: int, device: str) -> None:
    sizes = BlockSizes(8, 4, 8, 3)
    q = torch.zeros(batch, 4, length, 16, device=device)
    seen = whole_row(sizes, batch, length, device)
    expected = (batch, 2, length, min(3, length // 8))
    for choose in (choose_blocks, launch_best_blocks):
        assert choose(q, q[:, :2, : sizes.compressed(length)], seen, sizes).shape == expected


def test_the_operation_is_opaque_to_compilers(device: str) -> None:
    sizes = BlockSizes(8, 4, 8, 3)
    q, k = make_inputs(sizes, 63, 2, torch.float32, device)
    seen = whole_row(sizes, 2, 63, device)
    torch.library.opcheck(best_blocks, (q, k, *seen, 8, 4, 8, 3))
    compiled = torch.compile(choose_blocks, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (63, 41):
        part = [q[:, :, :length], k[:, :, : sizes.compressed(length)], whole_row(sizes, 2, length, device)]
        assert torch.equal(compiled(*part, sizes), choose_blocks(*part, sizes))


def test_the_plain_form_cuts_long_sequences(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = BlockSizes(8, 4, 8, 3)
    q, k = make_inputs(sizes, 63, 2, torch.float64, "cpu")
    seen = whole_row(sizes, 2, 63, "cpu")
    monkeypatch.setattr("dma_kernels.selected_blocks.choice._WEIGHED", 1)
    assert torch.equal(best_blocks(q, k, *seen, 8, 4, 8, 3), by_plain_code(q, k, seen, sizes))


def test_what_the_kernel_cannot_do_is_an_error(device: str) -> None:
    sizes = BlockSizes(8, 4, 8, 3)
    q, k = make_inputs(sizes, 40, 2, torch.float32, device)
    seen = whole_row(sizes, 2, 40, device)
    for wrong, message in (
        ((q[0], k, seen), "expected q .B, H, N, D. and compressed_keys"),
        ((q, k[:, :, 1:], seen), r"compressed_keys: expected \[2, 2, 9, 20\]"),
        ((q, k, seen._replace(run=seen.run[:1])), r"run: expected \[2, 40\]"),
        ((q, k, seen._replace(first=seen.first.float())), "first: expected integers, got torch.float32"),
        ((q, k, seen._replace(block_run=seen.run)), r"block_run: expected \[2, 9\]"),
        ((q[:, :3], k, seen), "a multiple of the KV heads"),
        ((q, k.half(), seen), "compressed_keys: expected torch.float32 as q"),
        ((q.double(), k.double(), seen), "float32, bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_blocks(*wrong, sizes)
    many = BlockSizes(8, 4, 8, 129)
    with pytest.raises(ValueError, match=r"at most 32 heads of a group, 128 chosen blocks.*got 2, 129 and 3"):
        choose_blocks(q, k, seen, many)


@pytest.mark.parametrize(("head_dim", "group"), [(128, 2), (64, 3)])
def test_it_compiles_for_hopper_without_spills(head_dim: int, group: int, tmp_path: Path) -> None:
    """In a process of its own, since Triton's interpreter is on in this one."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_choice.py")
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), "bf16", str(head_dim), str(group)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["shared"] <= 227 << 10  # of a core
    assert found["products"] > 0
    assert found["stack"] == 0


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_cuda_graph_replays_it(device: str) -> None:
    sizes = BlockSizes(32, 16, 64, 16)
    q, k = make_inputs(sizes, 3000, 2, torch.bfloat16, device)
    seen = whole_row(sizes, 2, 3000, device)
    choose_blocks(q, k, seen, sizes)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = choose_blocks(q, k, seen, sizes)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(found, choose_blocks(q, k, seen, sizes))
    check(found, q, k, seen, sizes)
