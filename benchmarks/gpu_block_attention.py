"""NSA's selected branch and its choice of blocks: our Triton kernels compared with others, in one run on one GPU.

    python benchmarks/gpu_block_attention.py [--xl CHECKOUT] [--fla CHECKOUT]

The checkouts are of github.com/XunhaoLai/native-sparse-attention-triton and github.com/fla-org/flash-linear-attention.
For the selected branch, the blocks of each query are given: 16 blocks of 64 tokens, chosen with random keys, so that
neighboring queries share few of them. The time of ours includes building its tiles. Choosing the blocks is timed
separately, with our kernel and in plain PyTorch. bfloat16, batch 1, head dim 128. Each figure is the minimum, median
and maximum in milliseconds.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from dma_kernels.selected_blocks.attention import block_attention
from dma_lightning.mixers.native_sparse_blocks import BlockGrid
from dma_lightning.mixers.position_cache import Places, PositionCache
from harness import CommandLine, Part, Result, Row, Table, describe, record
from harness.inputs import DENSE, dense, make_inputs
from harness.tables import gpu_of, interval, shape_of
from harness.timing import check_equal, forward_and_backward_ms, peak_gib, time_ms

SHAPES = [(6, 3, 16384), (16, 8, 4096), (16, 8, 16384), (16, 8, 32768), (64, 4, 16384)]  # query and KV heads, N
GRID, HEAD_DIM = BlockGrid(32, 16, 64, 16), 128


def make_compressed(kv_heads: int, length: int) -> tuple[Tensor, Places, Tensor]:
    """Random compressed keys in bfloat16, the places of one document, and each query's first position."""
    keys = torch.randn(1, kv_heads, GRID.compressed(length), HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    places = PositionCache(1, device=keys.device).place(length, None)
    return keys, places, places.first_of(places)


def choose_plainly(q: Tensor, keys: Tensor, places: Places, first: Tensor) -> Tensor:
    """The choice in plain PyTorch, for 1,024 queries at a time."""
    parts = [slice(i, i + 1024) for i in range(0, q.shape[2], 1024)]
    blocks = [GRID.choose(q[:, :, x], keys, first[:, x], places.rows(x.start, x.stop), places) for x in parts]
    return torch.cat(blocks, dim=2)


def make_chosen(heads: int, kv_heads: int, length: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v in bfloat16, the blocks chosen with random compressed keys, and each query's first position."""
    q, k, v, _ = (x.detach() for x in make_inputs(heads, kv_heads, length, HEAD_DIM))
    keys, places, first = make_compressed(kv_heads, length)
    return [x.requires_grad_() for x in (q, k, v)], choose_plainly(q, keys, places, first), first


def measure_choice() -> Iterator[Row]:
    """One row for each shape: time and peak memory of the choice, by the kernel and in plain PyTorch.

    Raises:
        RuntimeError: if the two differ in more than one in 1,000 queries. A few differ because of rounding.
    """
    for heads, kv_heads, length in SHAPES:
        q = make_inputs(heads, kv_heads, length, HEAD_DIM)[0].detach()
        keys, places, first = make_compressed(kv_heads, length)
        ways = {
            "ours": partial(GRID.choose_at_once, q, keys, first, places),
            "plain": partial(choose_plainly, q, keys, places, first),
        }
        sets = [way().sort(dim=-1).values for way in ways.values()]
        share = (sets[0] != sets[1]).any(-1).float().mean().item()
        if share > 1e-3:
            raise RuntimeError(f"{heads}/{kv_heads}, {length}: {share:.2%} of the queries choose other blocks")
        row: Row = {"heads": heads, "kv_heads": kv_heads, "length": length, "other_blocks": share}
        for name, way in ways.items():
            row |= {name: time_ms(way), f"{name}_gib": peak_gib(way)}
        yield row


def measure(peers: dict[str, Callable[..., Tensor]]) -> Iterator[Row]:
    """One row for each shape. For what a kernel cannot do, the row has the reason instead of a time."""
    for heads, kv_heads, length in SHAPES:
        inputs, blocks, first = make_chosen(heads, kv_heads, length)
        ways = {"ours": lambda q, k, v, blocks=blocks, first=first: block_attention(q, k, v, blocks, first, None, 64)}
        ways |= {name: partial(peer, blocks=blocks) for name, peer in peers.items()}
        row: Row = {"heads": heads, "kv_heads": kv_heads, "length": length}
        expected = None
        for name, way in ways.items():
            try:
                out = way(*inputs)
                gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
            except Exception as error:
                row[name] = f"{type(error).__name__}: {str(error)[-200:]}"
                continue
            expected = expected or [out, *gradients]
            check_equal([out, *gradients], expected, name)
            row[name] = forward_and_backward_ms(partial(way, *inputs), inputs)
        for name, backend in DENSE.items():
            with sdpa_kernel(backend):
                row[name] = forward_and_backward_ms(partial(dense, *inputs), inputs)
        yield row


def time_of(figure: dict[str, list[float]] | str | None, part: str) -> str:
    """The cell of a kernel that was not run, could not compute this, or was timed."""
    if isinstance(figure, dict):
        return interval(figure[part])
    return "refuses" if figure else ""


def load_xl(checkout: Path) -> Callable[..., Tensor]:
    """The selected branch of native-sparse-attention-triton, loaded without its package, which needs flash-attn."""
    for name in ("native_sparse_attention", "native_sparse_attention.ops", "native_sparse_attention.ops.triton"):
        module = types.ModuleType(name)
        module.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = module
    attend = importlib.import_module("native_sparse_attention.ops.triton.topk_sparse_attention").topk_sparse_attention

    def xl(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        ends = torch.tensor([0, q.shape[2]], dtype=torch.int32, device=q.device)
        rows = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        return attend(*rows, blocks[0].int(), GRID.select_block, ends).transpose(0, 1)[None]

    return xl


def load_fla(checkout: Path) -> Callable[..., Tensor]:
    """The selected branch of flash-linear-attention."""
    sys.path.insert(0, str(checkout))
    attend = importlib.import_module("fla.ops.nsa.parallel").ParallelNSAFunction.apply

    def fla(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        rows = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        chosen = blocks.transpose(1, 2).contiguous()  # [B, N, G, m]
        counts = (chosen >= 0).sum(-1)
        return attend(*rows, chosen, counts, GRID.select_block, HEAD_DIM**-0.5, None).transpose(1, 2)

    return fla


def tables(result: Result) -> list[Part]:
    """What the pages show: forward and backward by shape and kernel."""
    names = ("ours", "XL", "fla", *DENSE)
    rows = []
    for row in result["selected"]:
        for part in ("forward", "backward"):
            rows.append([shape_of(row), part, *(time_of(row.get(name), part) for name in names)])
    parts: list[Part] = [
        Table(
            rows,
            "**`python benchmarks/gpu_block_attention.py`**: milliseconds of the selected branch of native sparse "
            "attention on a GPU; lower is better. The blocks of each query are given (16 of 64 tokens, chosen with "
            "random keys). bfloat16, batch 1, head dim 128. It is compared with the Triton kernels of XunhaoLai "
            "(9bea856) and of flash-linear-attention (`fla`, bc3b101d, which takes only groups of 16 heads or more), "
            "and with dense attention. The time of `ours` includes building its tiles. Median [min - max] of 3 "
            f"({gpu_of(result)}).",
            ["heads, N", "", "ours", "native-sparse-attention-triton", "fla", *(f"{name}, dense" for name in DENSE)],
            labels=2,
        )
    ]
    return parts + ([choice_table(result)] if "choice" in result else [])


def choice_table(result: Result) -> Table:
    """What the pages show about the choice of blocks."""
    ways = ("ours", "plain")
    rows = [
        [shape_of(row), *(interval(row[x]) for x in ways), *(f"{row[f'{x}_gib']:.2f}" for x in ways)]
        for row in result["choice"]
    ]
    return Table(
        rows,
        "The choice of the blocks, by the kernel and in plain PyTorch for 1,024 queries at a time; lower is better. "
        f"Median [min - max] of 3 ({gpu_of(result)}).",
        ["heads, N", "ours, ms", "plain PyTorch, ms", "ours, peak GiB", "plain PyTorch, peak GiB"],
    )


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "gpu_block_attention", gpus=1, duration="less than ten minutes on an H200")
    line.add_argument("--xl", type=Path, help="checkout of native-sparse-attention-triton")
    line.add_argument("--fla", type=Path, help="checkout of flash-linear-attention")
    args = line.parse_args()
    peers = {"XL": load_xl(args.xl)} if args.xl else {}
    peers |= {"fla": load_fla(args.fla)} if args.fla else {}
    record(args.out, {"environment": describe()}, {"selected": measure(peers), "choice": measure_choice()}, tables)


if __name__ == "__main__":
    main()
