"""Speed and memory of the `flex` backend and of the mask builder on a GPU, compared with the strongest dense baselines.

There are four tables: forward and backward with a given plan (selection and plan are timed separately), building block
masks, ways to compute the gradient of the key biases, and peak memory by length. bfloat16, batch 1, head dim 128,
random scores. Each figure is the median [min - max] of several measurements by Triton's `do_bench`, each of which is
itself a median.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dma_flex import (
    FlexPlan,
    Lifetimes,
    block_mask,
    flex_segment_attention,
    key_bias_score_mod,
    lifetime_mask_mod,
)
from dma_kernels import segment_attention
from dma_kernels.attention.key_gradients import key_gradients
from harness import CommandLine, Part, Result, Row, Table, describe, record
from harness.inputs import DENSE, SHAPES, dense, make_inputs
from harness.tables import gpu_of, interval, length_of, shape_of
from harness.timing import REPEATS, check_equal, forward_and_backward_ms, peak_gib, time_ms

HEAD_DIM = 128
LENGTHS = [*(2**i for i in range(13, 19)), 2**20]

compiled_flex = torch.compile(flex_attention, fullgraph=True, dynamic=False)
compiled_block_mask = torch.compile(block_mask, fullgraph=True, dynamic=False)
compiled_create_block_mask = torch.compile(create_block_mask, dynamic=False)


def check() -> None:
    """Before anything is timed: `flex` equals `torch` in output and gradients, and block masks equal PyTorch's."""
    *qkv, ranks = make_inputs(16, 4, 5000)
    inputs, mask = [*qkv, ranks.detach().exp().requires_grad_()], Lifetimes.top_w(ranks, 1024)
    results = []
    for function in (flex_segment_attention, segment_attention):
        out = function(*inputs, mask)
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), inputs)])
    check_equal(*results, "flex")
    found, mask_mod = compiled_block_mask(mask, 5000, 128, 16), lifetime_mask_mod(mask.birth, mask.death, 16)
    expected = create_block_mask(mask_mod, 1, 16, 5000, 5000, "cuda")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def measure_masks(length: int) -> Row:
    """Time of building a block mask of 16 query and 4 KV heads from its lifetimes."""
    torch._dynamo.reset()  # a real program has one length; with several, each call would check the guards of all
    mask = Lifetimes.top_w(torch.randn(1, 4, length, device="cuda"), 1024)
    mask_mod = lifetime_mask_mod(mask.birth, mask.death, 16)
    return {
        "length": length,
        "block_mask, eager": time_ms(lambda: block_mask(mask, length, 128, 16)),
        "block_mask, compiled": time_ms(lambda: compiled_block_mask(mask, length, 128, 16)),
        "create_block_mask, compiled": time_ms(
            lambda: compiled_create_block_mask(mask_mod, 1, 16, length, length, "cuda")
        ),
    }


def measure_attention(heads: int, kv_heads: int, length: int, window: int) -> Row:
    """Dense causal attention, and dynamic mask attention with a given plan; selection and plan separately."""
    *qkv, ranks = make_inputs(heads, kv_heads, length)
    scores = ranks.detach().exp().requires_grad_()
    mask = Lifetimes.top_w(ranks, window)
    plan, naive = FlexPlan.of(mask, 1, heads, kv_heads), block_mask(mask, length, num_heads=heads)

    def flex() -> Tensor:
        return flex_segment_attention(*qkv, scores, mask, plan=plan)

    def natural_order() -> Tensor:
        return compiled_flex(*qkv, key_bias_score_mod(scores, heads), naive, enable_gqa=True)

    row: Row = {"heads": heads, "kv_heads": kv_heads, "length": length, "window": window}
    row["selection"] = {"forward": time_ms(lambda: Lifetimes.top_w(ranks, window))}
    row["plan"] = {"forward": time_ms(lambda: FlexPlan.of(mask, 1, heads, kv_heads))}
    row["flex"] = forward_and_backward_ms(flex, [*qkv, scores])
    row["flex, natural order"] = forward_and_backward_ms(natural_order, [*qkv, scores])
    for name, backend in DENSE.items():
        with sdpa_kernel(backend):
            row[name] = forward_and_backward_ms(partial(dense, *qkv), qkv)
    return row


def measure_memory(length: int) -> Row:
    """Peak memory of selection, plan and attention at 16 query and 4 KV heads, w = 1024; 1M tokens forward only."""
    *qkv, ranks = make_inputs(16, 4, length)

    def attend() -> Tensor:
        return flex_segment_attention(*qkv, ranks.exp(), Lifetimes.top_w(ranks, 1024))

    def train() -> None:
        out = attend()
        torch.autograd.grad(out, [*qkv, ranks], out.detach())

    if length < 2**20:
        return {"length": length, "train_gib": peak_gib(train)}
    with torch.no_grad():
        return {"length": length, "forward_gib": peak_gib(attend)}


def measure_bias_gradients() -> Iterator[Row]:
    """Ways to compute the gradient of the key biases, over segments at 32k: forward, and backward of q, k, v, bias."""
    heads, kv_heads, length, window = SHAPES[0]
    q, k, v, ranks = (x.detach() for x in make_inputs(heads, kv_heads, length))
    plan = FlexPlan.of(Lifetimes.top_w(ranks, window), 1, heads, kv_heads)
    slots = plan.slots
    q, k, v = slots.split_queries(q), slots.gather(k), slots.gather(v)
    bias = slots.gather(ranks.exp()[..., None]).squeeze(-1)
    column = torch.zeros(1, 1, 1, 16, device="cuda", dtype=q.dtype)  # the smallest width that a tensor core takes
    one = column.index_fill(-1, torch.tensor([0], device="cuda"), 1)
    q_wide = torch.cat([q, one.expand(*q.shape[:3], -1)], -1)
    k_wide = torch.cat([k, one * bias[..., None].to(k.dtype) * HEAD_DIM**0.5], -1)
    common = {"block_mask": plan.block_mask, "enable_gqa": True, "scale": HEAD_DIM**-0.5}

    def run(bias_mod: Tensor | None, *qkv: Tensor) -> Tensor:
        score_mod = None if bias_mod is None else key_bias_score_mod(bias_mod, heads)
        return compiled_flex(*qkv, score_mod, **common)

    cases = {
        "bias without gradient": ((q, k, v), bias, False),
        "captured bias (FlexAttention's atomics)": ((q, k, v), bias, True),
        "extra key column": ((q_wide, k_wide, v), None, False),
    }
    for name, (qkv, captured, trained) in cases.items():
        inputs = [x.detach().clone().requires_grad_() for x in qkv]
        captured = captured if captured is None else captured.clone().requires_grad_(trained)
        function = partial(run, captured, *inputs)
        yield {"way": name, **forward_and_backward_ms(function, [*inputs, captured] if trained else inputs)}
    lse = torch.full(q.shape[:3], 8.0, device="cuda")  # the time does not depend on the values

    def kernel() -> tuple[Tensor, ...]:
        return key_gradients(q, k, v, bias, slots.birth, slots.death, lse, lse, q, HEAD_DIM**-0.5)

    yield {"way": "key-major kernel: dk, dv and dbias together", "backward": time_ms(kernel)}


def attention_rows(row: Row) -> Iterator[list[str | None]]:
    """Lines of a shape: forward, backward, both; with selection and plan, also the speedup over cuDNN."""
    shape, names = shape_of(row), ("flex", *DENSE, "flex, natural order")
    times = {name: {part: row[name][part][1] for part in ("forward", "backward")} for name in ("flex", "cuDNN")}
    for part in ("forward", "backward"):
        ratio = times["cuDNN"][part] / times["flex"][part]
        yield [shape, part, *(interval(row[name][part]) for name in names), f"{ratio:.1f}x"]
    ours, dense_ = (sum(times[name].values()) for name in ("flex", "cuDNN"))
    yield [shape, "both", f"{ours:.3g}", f"{dense_:.3g}", None, None, f"{dense_ / ours:.1f}x"]
    beside = [row[name]["forward"] for name in ("selection", "plan")]
    ratio = dense_ / (ours + beside[0][1] + beside[1][1])
    yield [shape, "selection; plan", "; ".join(map(interval, beside)), None, None, None, f"{ratio:.1f}x"]


def tables(result: Result) -> list[Part]:
    """What the pages show: attention, block masks, gradients of key biases, and memory."""
    setting = f"bfloat16, batch {result['shape']['batch']}, head dim {result['shape']['head_dim']}"
    mask_names = ("block_mask, eager", "block_mask, compiled", "create_block_mask, compiled")
    memory = result["memory"]

    def mask_ratio(row: Row) -> str:
        return f"{row[mask_names[2]][1] / row[mask_names[1]][1]:.1f}x"

    return [
        Table(
            chain.from_iterable(map(attention_rows, result["attention"])),
            "**`python benchmarks/gpu_attention.py`**: milliseconds of forward and backward passes of attention on a "
            "GPU; lower is better. Times include gathers and the gradient of the key biases. The last line of each "
            "shape has the times of selection and plan alone, and the speedup with everything included. cuDNN and "
            f"FlashAttention-2 are PyTorch's dense causal attention; {setting}, random ranks; median [min - max] of "
            f"{result['shape']['repeats']} ({gpu_of(result)}).",
            ["heads, N, w", "", "`flex`", *DENSE, "FlexAttention, natural order", "`flex` against cuDNN"],
            labels=2,
        ),
        Table(
            result["masks"],
            "Milliseconds to build a block mask of 16 query and 4 KV heads from given lifetimes; lower is better:",
            ["N", *(f"`{name.replace(',', '`,')}" for name in mask_names), "speedup"],
            lambda row: [length_of(row), *(interval(row[name]) for name in mask_names), mask_ratio(row)],
        ),
        Table(
            result["bias_gradients"],
            "Milliseconds of attention over segments at 32k, w = 1024, for each way to compute the gradient of the key "
            "biases; lower is better. The `flex` backend uses the last way, in which FlexAttention computes only dq:",
            ["", "forward", "backward"],
            lambda row: [row["way"], *(interval(row[x]) if x in row else "" for x in ("forward", "backward"))],
        ),
        Table(
            [["GiB", *(f"{row.get('train_gib', row.get('forward_gib')):.2f}" for row in memory)]],
            "Peak GPU memory of selection, plan, forward and backward together, with 16 query and 4 KV heads, "
            "w = 1024; lower is better (the same in every run):",
            ["N", *("1M, forward only" if "forward_gib" in row else length_of(row) for row in memory)],
        ),
    ]


def main() -> None:
    """Check, measure, print, and write the JSON file after each row."""
    args = CommandLine(__doc__, "gpu_attention", gpus=1, duration="less than ten minutes on an H200").parse_args()
    torch._dynamo.config.recompile_limit = 64  # each shape below compiles once
    torch._functorch.config.donated_buffer = False  # the backward is timed repeatedly after a single forward
    check()
    shape = {"head_dim": HEAD_DIM, "dtype": "bfloat16", "batch": 1, "repeats": REPEATS}
    rows = {
        "attention": (measure_attention(*shape) for shape in SHAPES),
        "masks": (measure_masks(length) for length in (8192, 32768, 131072)),
        "bias_gradients": measure_bias_gradients(),
        "memory": (measure_memory(length) for length in LENGTHS),
    }
    record(args.out, {"environment": describe(), "shape": shape}, rows, tables)


if __name__ == "__main__":
    main()
