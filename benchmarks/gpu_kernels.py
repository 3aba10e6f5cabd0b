"""Speed and memory of the `triton` backend on a GPU, everything included, beside the strongest baselines.

    python benchmarks/gpu_kernels.py      checks, then all tables, and a JSON file under benchmarks/results/

Scores and ranks are given; selection, plan, gathers, kernels and the gradient of the scores are all timed. Forward and
backward are timed together, as in training, eagerly and as a CUDA graph; beside them PyTorch's dense causal attention
(cuDNN, FlashAttention-2) and our `flex` backend. Further tables: the parts, with useful TFLOP/s (of live pairs only);
cost by length up to 1M; score processes other than random. bfloat16, batch 1. Each figure is the median [min - max] of
several measurements by Triton's `do_bench`, each itself a median.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import describe, write_tables
from gpu_attention import REPEATS, peak_gib, time_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_flex import flex_segment_attention
from dma_kernels import Lifetimes, SegmentSlots, fused_attention, segment_attention
from dma_kernels.attention.kernels.forward import launch_forward
from dma_kernels.attention.kernels.key_gradients import launch_key_gradients
from dma_kernels.attention.kernels.query_gradients import launch_query_gradients
from dma_kernels.attention.ops import attend_slots
from dma_kernels.segments.gather_kernels import launch_gather_rows, launch_sum_copies

# Query heads, KV heads, N, w: ours, and the paper's.
SHAPES = [(16, 4, 32768, 1024), (16, 4, 131072, 2048)]
SHAPES += [(32, 8, length, 1024) for length in (8192, 16384, 32768)]
LENGTHS = [2**i for i in range(14, 21)]


def make_inputs(heads: int, kv_heads: int, length: int, head_dim: int = 128) -> list[Tensor]:
    """q, k, v in bfloat16 as projections leave them, and ranks in float32, that require grad."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, length, h, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    return [x.requires_grad_() for x in (q, k, v, torch.randn(1, kv_heads, length, device="cuda"))]


def step(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(attend(*inputs), inputs, grad)


def dynamic(attend: Callable[..., Tensor], window: int, *inputs: Tensor) -> Tensor:
    """Attention of q, k, v and ranks, selection included; the scores are the ranks."""
    return attend(*inputs, Lifetimes.top_w(inputs[3], window))


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of what a function does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def check() -> None:
    """Every figure below is of kernels that equal plain PyTorch in output and gradients."""
    for head_dim in (64, 128):
        inputs = make_inputs(16, 4, 5000, head_dim)
        grad = torch.randn_like(inputs[0])
        expected, found, flex = (
            step(partial(dynamic, attend, 1024), inputs, grad)
            for attend in (segment_attention, fused_attention, flex_segment_attention)
        )
        for x, y, z in zip(found, flex, expected, strict=True):
            for other in (x, y):
                error = ((other - z).float().norm() / z.float().norm()).item()
                assert error < 0.02, error


def measure_attention(heads: int, kv_heads: int, length: int, window: int) -> dict[str, Any]:
    """Forward and backward of all backends, everything included."""
    inputs = make_inputs(heads, kv_heads, length)
    grad = torch.randn_like(inputs[0])
    row: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "length": length, "window": window}
    run = partial(step, partial(dynamic, fused_attention, window), inputs, grad)
    row["triton"] = time_ms(run)
    row["triton, forward"] = time_ms(lambda: dynamic(fused_attention, window, *inputs))
    row["triton, CUDA graph"] = time_ms(captured(run))
    row["flex"] = time_ms(partial(step, partial(dynamic, flex_segment_attention, window), inputs, grad))
    dense = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    qkv = [x.detach().contiguous().requires_grad_() for x in inputs[:3]]
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            row[name] = time_ms(partial(step, dense, qkv, grad))
            row[f"{name}, forward"] = time_ms(partial(dense, *qkv))
    return row


def measure_parts(heads: int, kv_heads: int, length: int, window: int, head_dim: int) -> dict[str, Any]:
    """Every launch of forward and backward by itself; TFLOP/s count the live pairs only."""
    inputs = make_inputs(heads, kv_heads, length, head_dim)
    q, k, v, ranks = (x.detach() for x in inputs)
    mask = Lifetimes.top_w(ranks, window)
    slots = SegmentSlots.of(mask, 1, kv_heads)
    copies, where = slots.copies, (slots.birth, slots.death)
    sizes = {"scale": head_dim**-0.5, "segment_length": slots.segment_length}
    arguments = (copies.row, copies.first, copies.slot, *where)
    out, lse, *by_slot = attend_slots(q, k, v, ranks, *arguments, **sizes)
    grad, shape = torch.randn_like(out), [1, kv_heads, length, head_dim]
    _, delta = launch_query_gradients(q, *by_slot, *where, lse, out, grad, **sizes)
    parts = {
        "selection": lambda: Lifetimes.top_w(ranks, window),
        "selection, CUDA graph": captured(lambda: Lifetimes.top_w(ranks, window)),
        "plan": lambda: SegmentSlots.of(mask, 1, kv_heads),
        "plan, CUDA graph": captured(lambda: SegmentSlots.of(mask, 1, kv_heads)),
        "gather of k": lambda: launch_gather_rows(k, copies.row, head_rows=slots.filled_length),
        "forward kernel": lambda: launch_forward(q, *by_slot, *where, **sizes),
        "query gradients": lambda: launch_query_gradients(q, *by_slot, *where, lse, out, grad, **sizes),
        "key gradients": lambda: launch_key_gradients(q, *by_slot, *where, lse, delta, grad, **sizes),
        "sum of dk": lambda: launch_sum_copies(
            by_slot[0], copies.first, copies.slot, shape=shape, head_rows=slots.filled_length
        ),
    }
    row: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "length": length, "window": window}
    row |= {"head_dim": head_dim, "parts": {name: time_ms(part) for name, part in parts.items()}}
    flop = 2 * head_dim * mask.live_counts().sum().item() * heads / kv_heads  # of one matrix product
    forward, dq, dkv = (row["parts"][name][1] for name in ("forward kernel", "query gradients", "key gradients"))
    row["forward TFLOP/s"], row["backward TFLOP/s"] = 2e-9 * flop / forward, 5e-9 * flop / (dq + dkv)
    copied = 2 * copies.row.numel() * head_dim * k.element_size()
    row["gather TB/s"] = 1e-9 * copied / row["parts"]["gather of k"][1]
    return row


def measure_length(length: int) -> dict[str, Any]:
    """Time and peak memory of forward and backward at 16 query and 4 KV heads, w = 1024; selection and plan beside."""
    inputs = make_inputs(16, 4, length)
    grad = torch.randn_like(inputs[0])
    run = partial(step, partial(dynamic, fused_attention, 1024), inputs, grad)
    row = {"length": length, "train_gib": peak_gib(run), "ms": time_ms(run)}
    mask = Lifetimes.top_w(inputs[3], 1024)
    for name, part in (
        ("selection", lambda: Lifetimes.top_w(inputs[3], 1024)),
        ("plan", lambda: SegmentSlots.of(mask, 1, 4)),
    ):
        row[name], row[f"{name}, CUDA graph"] = time_ms(part), time_ms(captured(part))
    return row


def measure_processes() -> Iterator[dict[str, Any]]:
    """Forward and backward at 32k, w = 1024, for ranks of several kinds."""
    *qkv, random = make_inputs(16, 4, 32768)
    grad, noise = torch.randn_like(qkv[0]), random.detach()
    position = torch.linspace(0, 1, noise.shape[-1], device="cuda")
    decay = 0.99 ** torch.arange(2048, device="cuda").flip(0)
    autoregressive = F.conv1d(F.pad(noise.transpose(0, 1), (2047, 0)), decay[None, None]).transpose(0, 1)
    kinds = {"random": noise, "all equal": torch.zeros_like(noise), "drift up": noise + 20 * position}
    kinds |= {"drift down": noise - 20 * position, "AR(1), 0.99": autoregressive, "8 values": (2 * noise).round() / 2}
    for name, ranks in kinds.items():
        inputs = [*qkv, ranks.contiguous().requires_grad_()]
        yield {"ranks": name, "ms": time_ms(partial(step, partial(dynamic, fused_attention, 1024), inputs, grad))}


def main() -> None:
    """Check, measure, print, and write the JSON file after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_kernels.json")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # `flex` compiles for every shape below
    check()
    result: dict[str, Any] = {"environment": describe(), "shape": {"dtype": "bfloat16", "batch": 1, "repeats": REPEATS}}
    parts = [(16, 4, 32768, 1024, 128), (16, 4, 32768, 2048, 128), (16, 4, 32768, 2048, 64)]
    tables = {
        "parts": (measure_parts(*shape) for shape in parts),
        "attention": (measure_attention(*shape) for shape in SHAPES),
        "processes": measure_processes(),
        "lengths": (measure_length(length) for length in LENGTHS),
    }
    write_tables(args.out, result, tables)


if __name__ == "__main__":
    main()
