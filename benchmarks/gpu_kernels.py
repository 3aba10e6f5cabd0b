"""Speed and memory of the `triton` backend on a GPU, everything included, compared with the strongest baselines.

Scores and ranks are given. Selection, plan, gathers, kernels and the gradient of the scores are all timed. Forward and
backward are timed together, as in training, eagerly and as a CUDA graph. They are compared with PyTorch's dense causal
attention (cuDNN, FlashAttention-2) and with our `flex` backend. Further tables show the parts, with useful TFLOP/s (of
visible pairs only), the cost by length up to 1M, and ranks of other kinds than random. bfloat16, batch 1. Each figure
is the median [min - max] of several measurements by Triton's `do_bench`, each of which is itself a median.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.attention import sdpa_kernel

from dma_flex import flex_segment_attention
from dma_kernels import Lifetimes, SegmentSlots, fused_attention, segment_attention
from dma_kernels.attention.kernels.backward import launch_backward
from dma_kernels.attention.kernels.choose_forward import launch_chosen_forward
from dma_kernels.attention.kernels.delta import launch_delta
from dma_kernels.attention.kernels.key_gradients import key_tile
from dma_kernels.attention.kernels.query_gradients import list_key_tiles
from dma_kernels.attention.ops import attend_slots
from dma_kernels.segments.gather_kernels import launch_gather_keys
from dma_kernels.segments.sum_kernels import launch_sum_key_gradients
from harness import CommandLine, Part, Picture, Result, Row, Table, describe, record
from harness.inputs import DENSE, SHAPES, dense, dynamic, make_inputs, ranks_by_kind, step
from harness.tables import gpu_of, interval, length_of, shape_of
from harness.timing import REPEATS, captured, check_equal, peak_gib, time_ms

LENGTHS = [2**i for i in range(14, 21)]


def check() -> None:
    """Before anything is timed: the kernels equal plain PyTorch in output and gradients."""
    for head_dim in (64, 128):
        inputs = make_inputs(16, 4, 5000, head_dim, projected=True)
        grad = torch.randn_like(inputs[0])
        expected, found, flex = (
            step(partial(dynamic, attend, 1024), inputs, grad)
            for attend in (segment_attention, fused_attention, flex_segment_attention)
        )
        check_equal(found, expected, "triton")
        check_equal(flex, expected, "flex")


def measure_attention(heads: int, kv_heads: int, length: int, window: int) -> Row:
    """Forward and backward of all backends, everything included."""
    inputs = make_inputs(heads, kv_heads, length, projected=True)
    grad = torch.randn_like(inputs[0])
    row: Row = {"heads": heads, "kv_heads": kv_heads, "length": length, "window": window}
    run = partial(step, partial(dynamic, fused_attention, window), inputs, grad)
    row["triton"] = time_ms(run)
    row["triton, forward"] = time_ms(lambda: dynamic(fused_attention, window, *inputs))
    row["triton, CUDA graph"] = time_ms(captured(run))
    row["flex"] = time_ms(partial(step, partial(dynamic, flex_segment_attention, window), inputs, grad))
    qkv = [x.detach().contiguous().requires_grad_() for x in inputs[:3]]
    for name, backend in DENSE.items():
        with sdpa_kernel(backend):
            row[name] = time_ms(partial(step, dense, qkv, grad))
            row[f"{name}, forward"] = time_ms(partial(dense, *qkv))
    return row


def measure_parts(heads: int, kv_heads: int, length: int, window: int, head_dim: int) -> Row:
    """Every launch of forward and backward by itself. TFLOP/s count visible pairs only."""
    inputs = make_inputs(heads, kv_heads, length, head_dim, projected=True)
    q, k, v, ranks = (x.detach() for x in inputs)
    mask = Lifetimes.top_w(ranks, window)
    slots = SegmentSlots.of(mask, 1, kv_heads)
    copies, where = slots.copies, (slots.birth, slots.death)
    sizes = {"scale": head_dim**-0.5, "segment_length": slots.segment_length}
    arguments = (copies.row, copies.first, copies.slot, *where)
    out, lse, *by_slot = attend_slots(q, k, v, ranks, *arguments, **sizes)
    grad = torch.randn_like(out)
    block_k, segment = key_tile(q, where[0].shape[2]), slots.segment_length
    *_, base_2 = launch_gather_keys(k, v, ranks, None, copies.row, segment_length=segment)
    parts = {
        "selection": lambda: Lifetimes.top_w(ranks, window),
        "selection, CUDA graph": captured(lambda: Lifetimes.top_w(ranks, window)),
        "plan": lambda: SegmentSlots.of(mask, 1, kv_heads),
        "plan, CUDA graph": captured(lambda: SegmentSlots.of(mask, 1, kv_heads)),
        "gathers": lambda: launch_gather_keys(k, v, ranks, None, copies.row, segment_length=segment),
        "forward kernels": captured(lambda: launch_chosen_forward(q, *by_slot, *where, base_2=base_2, **sizes)),
        "backward kernels": captured(lambda: launch_backward(q, *by_slot, *where, lse, out, grad, **sizes)),
        "of these, rowsum(dO · O)": lambda: launch_delta(out, grad),
        "of these, lists of key tiles": lambda: list_key_tiles(*where, q, segment, key_tile=block_k),
        "sums": lambda: launch_sum_key_gradients(
            *by_slot, copies.first, copies.slot, shape=(1, kv_heads, length), wide=False
        ),
    }
    row: Row = {"heads": heads, "kv_heads": kv_heads, "length": length, "window": window}
    row |= {"head_dim": head_dim, "parts": {name: time_ms(part) for name, part in parts.items()}}
    flop = 2 * head_dim * mask.live_counts().sum().item() * heads / kv_heads  # of one matrix product
    forward, backward = (row["parts"][name][1] for name in ("forward kernels", "backward kernels"))
    row["forward TFLOP/s"], row["backward TFLOP/s"] = 2e-9 * flop / forward, 5e-9 * flop / backward
    copied = 2 * copies.row.numel() * (2 * head_dim * k.element_size() + ranks.element_size())  # read and written
    row["gather TB/s"] = 1e-9 * copied / row["parts"]["gathers"][1]
    return row


def measure_length(length: int) -> Row:
    """Time and peak memory of forward and backward with 16/4 heads, w = 1024; selection and plan separately."""
    inputs = make_inputs(16, 4, length, projected=True)
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


def measure_processes() -> Iterator[Row]:
    """Forward and backward at 32k, w = 1024, for ranks of several kinds, as CUDA graphs."""
    *qkv, random = make_inputs(16, 4, 32768, projected=True)
    grad = torch.randn_like(qkv[0])
    for name, ranks in ranks_by_kind(random).items():
        inputs = [*qkv, ranks.requires_grad_()]
        run = partial(step, partial(dynamic, fused_attention, 1024), inputs, grad)
        yield {"ranks": name, "ms": time_ms(captured(run))}


def tables(result: Result) -> list[Part]:
    """What the pages show: all backends, the parts, kinds of ranks, and lengths."""
    names = ("triton", "triton, CUDA graph", "flex", *DENSE)
    beside, graph = ("ms", "selection", "selection, CUDA graph", "plan", "plan, CUDA graph"), "as a CUDA graph"
    parts = result["parts"]
    part_rows = [[name, *(interval(row["parts"][name]) for row in parts)] for name in parts[0]["parts"]]
    for rate in ("forward TFLOP/s", "backward TFLOP/s"):
        part_rows.append([f"{rate}, live pairs only", *(f"{row[rate]:.0f}" for row in parts)])
    return [
        Table(
            result["attention"],
            "**`python benchmarks/gpu_kernels.py`**: milliseconds of a forward and backward pass of attention on a "
            "GPU; lower is better. Ranks are given; times include selection, plan, gathers and the gradient of the "
            f"key biases. bfloat16, batch 1, head dim 128, random ranks; median [min - max] of 3 ({gpu_of(result)}).",
            ["heads, N, w", "`triton`", "as a CUDA graph", "`flex`", *DENSE, "`triton` against cuDNN"],
            lambda row: [shape_of(row), *(interval(row[name]) for name in names), against_dense(row)],
        ),
        Table(
            part_rows,
            "Milliseconds of each part by itself; lower is better. The last two rows are TFLOP/s; higher is better:",
            ["16/4 heads, 32k", *(f"w = {row['window']}, head dim {row['head_dim']}" for row in parts)],
        ),
        Table(
            [[interval(row["ms"]) for row in result["processes"]]],
            "Milliseconds of a forward and backward pass at 32k, w = 1024, as a CUDA graph, for each kind of ranks; "
            "lower is better:",
            [row["ranks"] for row in result["processes"]],
            labels=0,
        ),
        Table(
            result["lengths"],
            "Milliseconds and peak memory by length, w = 1024, 16/4 heads; lower is better:",
            ["N", "forward + backward ms", "selection ms", graph, "plan ms", graph, "peak GiB"],
            lambda row: [length_of(row), *(interval(row[name]) for name in beside), f"{row['train_gib']:.2f}"],
        ),
        Picture("Time by length", "speed.png"),
    ]


def against_dense(row: Row) -> str:
    """How many times as fast as cuDNN, eagerly and as a CUDA graph."""
    eager, graph = (row["cuDNN"][1] / row[name][1] for name in ("triton", "triton, CUDA graph"))
    return f"{eager:.1f}x, graph {graph:.1f}x"


def main() -> None:
    """Check, measure, print, and write the JSON file after each row."""
    args = CommandLine(__doc__, "gpu_kernels", gpus=1, duration="less than ten minutes on an H200").parse_args()
    torch._dynamo.config.recompile_limit = 64  # `flex` compiles for every shape below
    check()
    result = {"environment": describe(), "shape": {"dtype": "bfloat16", "batch": 1, "repeats": REPEATS}}
    parts = [(16, 4, 32768, 1024, 128), (16, 4, 32768, 2048, 128), (16, 4, 32768, 2048, 64)]
    rows = {
        "parts": (measure_parts(*shape) for shape in parts),
        "attention": (measure_attention(*shape) for shape in SHAPES),
        "processes": measure_processes(),
        "lengths": (measure_length(length) for length in LENGTHS),
    }
    record(args.out, result, rows, tables)


if __name__ == "__main__":
    main()
