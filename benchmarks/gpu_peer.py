"""Forward and backward compared with flash-sparse-attn's compact Triton kernel, in one run on one GPU.

    python benchmarks/gpu_peer.py CHECKOUT      a checkout of github.com/flash-algo/flash-sparse-attention at v1.2.3

The two masks differ. That kernel selects one set of w keys per head for the whole sequence, which uses the future, and
its first queries see almost no keys. It serves only as a measure of speed: both visit at most w keys per query.
Selection (there `topk`) is included on both sides. bfloat16, batch 1, 16 query and 4 KV heads, head dim 128.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dma_kernels import fused_attention
from harness import CommandLine, Part, Result, Row, Table, describe, record
from harness.inputs import dynamic, make_inputs, step
from harness.tables import gpu_of, interval, length_of
from harness.timing import time_ms

SHAPES = [(8192, 1024), (32768, 1024), (32768, 2048), (131072, 2048)]


def load_peer(checkout: Path) -> Callable[..., Tensor]:
    """The attention function, loaded from one file of the checkout."""
    path = checkout / "flash_sparse_attn" / "flash_dmattn_triton.py"
    spec = importlib.util.spec_from_file_location("flash_dmattn_triton", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"{path}: not found; expected a checkout of flash-sparse-attention at v1.2.3")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.triton_dmattn_func


def compact(attend: Callable[..., Tensor], window: int, q: Tensor, k: Tensor, v: Tensor, ranks: Tensor) -> Tensor:
    """Attention to one set of top-w keys per head, selected over the whole sequence, `[B, H, N, D]`."""
    kept = ranks.detach().topk(window, dim=-1).indices.sort(dim=-1).values
    return attend(q, k, v, ranks.to(q.dtype), kept, is_causal=True)


def measure(attend: Callable[..., Tensor]) -> Iterator[Row]:
    """One row for each shape."""
    for length, window in SHAPES:
        inputs = make_inputs(16, 4, length, projected=True)
        grad = torch.randn_like(inputs[0])
        ways = {"triton": partial(dynamic, fused_attention, window), "compact": partial(compact, attend, window)}
        row: Row = {"length": length, "window": window}
        for name, way in ways.items():
            row[f"{name}, forward"] = time_ms(partial(way, *inputs))
            row[name] = time_ms(partial(step, way, inputs, grad))
        yield row


def tables(result: Result) -> list[Part]:
    """What the pages show: both kernels by shape."""
    rows = []
    for row in result["peer"]:
        for part, end in (("forward", ", forward"), ("forward + backward", "")):
            ours, theirs = row[f"triton{end}"], row[f"compact{end}"]
            ratio = f"{theirs[1] / ours[1]:.1f}x"
            rows.append([f"{length_of(row)}, {row['window']}", part, interval(ours), interval(theirs), ratio])
    return [
        Table(
            rows,
            "**`python benchmarks/gpu_peer.py`**: milliseconds of our attention and of the compact Triton kernel of "
            "flash-sparse-attn 1.2.3 on a GPU; lower is better. That kernel selects one set of w keys per head for the "
            "whole sequence, so it sees the future and computes another model. 16/4 heads, selection included on both "
            f"sides ({gpu_of(result)}).",
            ["N, w", "", "`triton`", "flash-sparse-attn, compact", "speedup"],
            labels=2,
        )
    ]


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "gpu_peer", gpus=1, duration="less than ten minutes on an H200")
    line.add_argument("checkout", type=Path, help="checkout of flash-sparse-attention at v1.2.3")
    args = line.parse_args()
    record(args.out, {"environment": describe()}, {"peer": measure(load_peer(args.checkout))}, tables)


if __name__ == "__main__":
    main()
