"""Decoding on a GPU: one layer compared with dense attention over a full cache, and a whole model by context length.

The shape is the paper's: 32 query and 8 KV heads, head dim 128, w = 1024, bfloat16. Steps are replayed as CUDA graphs.
If a step reads w keys only, its graph holds several layers, each with its own cache, so that no layer finds its keys in
the GPU's L2 cache. The new key always replaces another one. Each figure is the minimum, median and maximum of several
medians by Triton's `do_bench`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_kernels import DynamicMaskCache, KeyCache, NewKeys, fused_attention
from dma_kernels.decoding.dynamic_cache import StepBackend
from dma_lightning import DogeForCausalLM
from dma_lightning.cli.sizes import read_config
from harness import CONFIGS, CommandLine, Part, Picture, Result, Row, Table, describe, record
from harness.inputs import DENSE
from harness.tables import gpu_of, interval, length_of
from harness.timing import captured, time_ms

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 8, 128, 1024
DENSE_LENGTHS = {1: [1 << n for n in (16, 17, 18, 19)], 32: [1 << 16, 1 << 17]}  # lengths by batch
BATCHES = [1, 4, 32]
CONTEXTS = [1 << n for n in (10, 12, 14, 16, 17, 18, 19)]
CHUNK = 1 << 15


def microseconds(function: Callable[[], Any], calls: int) -> list[float]:
    """Time per call, as a CUDA graph, of a function that makes several calls."""
    return [1e3 * ms / calls for ms in time_ms(captured(function))]


def make_inputs(batch: int, length: int) -> dict[str, Tensor | NewKeys]:
    """Arguments of `DynamicMaskCache.attend`, with random ranks."""
    q = torch.randn(batch, HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    ranks = torch.randn(batch, KV_HEADS, length, device="cuda")
    return {"q": q, "new": NewKeys(k, v, ranks.sin(), ranks)}


def filled_cache(batch: int, length: int, backend: StepBackend = "triton") -> DynamicMaskCache:
    """A cache that has read `length` positions."""
    cache = DynamicMaskCache(batch, KV_HEADS, HEAD_DIM, WINDOW, dtype=torch.bfloat16, device="cuda", backend=backend)
    for start in range(0, length, CHUNK):
        cache.attend(**make_inputs(batch, min(CHUNK, length - start)), attention=fused_attention)
    return cache


def check() -> None:
    """Before anything is timed: the kernel's step leaves the same output and cache as the plain step."""
    caches = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        caches.append(filled_cache(2, 3000, backend))
    for _ in range(100):
        inputs = make_inputs(2, 1)
        outs = [cache.attend(**inputs) for cache in caches]
        torch.testing.assert_close(*outs, atol=1e-2, rtol=1e-2)
        states = [cache.state_dict() for cache in caches]
        assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def step_all(caches: Sequence[KeyCache], inputs: dict[str, Tensor]) -> None:
    """One step with every cache."""
    for cache in caches:
        cache.attend(**inputs)


def dense_all(q: Tensor, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Dense attention of one query to all keys and values."""
    for k, v in kv:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def measure_steps() -> Iterator[Row]:
    """A layer's step by batch size, and dense attention to the same number of keys, without a cache to update."""
    for batch in BATCHES:
        layers = 4 if batch > 4 else 16
        inputs = make_inputs(batch, 1)
        inputs["new"].rank.fill_(9.0)  # if the rank equals another one, the new key wins
        row: Row = {"batch": batch, "window": WINDOW}
        for name in ("triton", "torch"):
            caches = [filled_cache(batch, 2 * WINDOW, name) for _ in range(layers)]
            row[name] = microseconds(partial(step_all, caches, inputs), layers)
        kv = [(cache.state.key, cache.state.value) for cache in caches]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            row["FlashAttention-2, w keys"] = microseconds(partial(dense_all, inputs["q"], kv), layers)
        yield row


def measure_dense() -> Iterator[Row]:
    """Dense attention of one query to a full cache, without appending to it."""
    for batch, lengths in DENSE_LENGTHS.items():
        for length in lengths:
            q = torch.randn(batch, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            k, v = torch.randn(2, batch, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            row: Row = {"batch": batch, "length": length, "gib": 2 * k.nbytes / 2**30}
            for name, backend in DENSE.items():
                with sdpa_kernel(backend):
                    row[name] = microseconds(partial(dense_all, q, [(k, v)]), 1)
            yield row


def measure_contexts() -> Iterator[Row]:
    """A layer's step and the memory of its cache, by the number of positions read before."""
    for length in CONTEXTS:
        caches = [filled_cache(1, length) for _ in range(16)]
        inputs = make_inputs(1, 1)
        state = caches[0].state_dict().values()
        times = microseconds(partial(step_all, caches, inputs), len(caches))
        yield {"length": length, "us": times, "mib": sum(x.nbytes for x in state) / 2**20}


def next_token(model: DogeForCausalLM, token: Tensor, cache: Sequence[KeyCache]) -> None:
    """Replace a token `[1, 1]` in place by the most likely next one."""
    token.copy_(model(token, cache=cache, last_only=True).argmax(-1))


@torch.no_grad()
def measure_model(path: Path) -> Iterator[Row]:
    """Time of a token of a whole model with random weights, eagerly and as a CUDA graph; memory of all caches."""
    config = read_config(path)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = DogeForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
    for length in CONTEXTS:
        cache = model.new_cache(1)
        for start in range(0, length, CHUNK):
            part = torch.randint(config.vocab_size, (1, min(CHUNK, length - start)), device="cuda")
            model(part, cache=cache, last_only=True)
        token = part[:, -1:].clone()
        step = partial(next_token, model, token, cache)
        eager = time_ms(step)
        graph = time_ms(captured(step))
        state = [x for layer in cache for x in layer.state_dict().values()]
        row = {"parameters": model.num_parameters, "length": length, "eager": eager, "CUDA graph": graph}
        yield row | {"mib": sum(x.nbytes for x in state) / 2**20}


def tables(result: Result) -> list[Part]:
    """What the pages show: steps by batch size, and by the number of tokens read."""
    dense = {(row["batch"], row["length"]): row["cuDNN"][1] for row in result["dense"]}
    lengths = sorted({length for _, length in dense})
    names = ("triton", "torch", "FlashAttention-2, w keys")

    def beside_dense(row: Row, length: int) -> str:
        time = dense.get((row["batch"], length))
        return "" if time is None else f"{time:.0f} ({time / row['triton'][1]:.0f}x)"

    return [
        Table(
            result["steps"],
            "**`python benchmarks/gpu_decode.py`**: microseconds of a decoding step of one layer on a GPU; lower is "
            "better. In a step, the new key enters the cache and its query attends. Each step is a replayed CUDA "
            "graph. 32 query and 8 KV heads, head dim 128, w = 1024, bfloat16. It is compared with PyTorch's "
            "FlashAttention-2 over the same number of keys, without a cache to update, and with PyTorch's cuDNN "
            "attention over a full cache (in parentheses: how many times as long it takes). Median [min - max] of 3 "
            f"({gpu_of(result)}).",
            ["batch", "`triton`", "plain PyTorch", names[2], *(f"cuDNN, {x // 1024}k keys" for x in lengths)],
            lambda row: [row["batch"], *(interval(row[x]) for x in names), *(beside_dense(row, x) for x in lengths)],
            labels=0,
        ),
        Table(
            [
                [
                    *(length_of(layer), interval(layer["us"]), f"{layer['mib']:.2f}"),
                    *(interval(model["eager"]), interval(model["CUDA graph"]), f"{model['mib']:.0f}"),
                ]
                for layer, model in zip(result["contexts"], result["model"], strict=True)
            ],
            "Time and cache memory at batch 1, by the number of tokens read; lower is better. The first columns are "
            "for the step above. The others are for one token of a whole model and for all of its caches "
            f"({result['model'][0]['parameters'] / 1e9:.2f}B parameters, random weights, "
            "`configs/model/1.7b-published.yaml`: 28 layers, w = 2048):",
            ["tokens read", "a layer's step, us", "MiB", "a token, eagerly, ms", "as a CUDA graph, ms", "MiB"],
            labels=0,
        ),
        Picture("Time of a decoding step by context", "decode.png"),
    ]


def main() -> None:
    """Check, measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "gpu_decode", gpus=1, duration="less than ten minutes on an H200")
    line.add_argument(
        "--model",
        type=Path,
        default=CONFIGS / "model" / "1.7b-published.yaml",
        help="config of the whole model (default: that of 1.7b)",
    )
    args = line.parse_args()
    check()
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "window": WINDOW}
    rows = {
        "steps": measure_steps(),
        "dense": measure_dense(),
        "contexts": measure_contexts(),
        "model": measure_model(args.model),
    }
    record(args.out, {"environment": describe(), "shape": shape}, rows, tables)


if __name__ == "__main__":
    main()
