"""Decoding on a GPU: a step of the small cache beside dense attention over a full one, and a whole model by context.

    python benchmarks/gpu_decode.py      checks, then all tables, and a JSON file under benchmarks/results/

The paper's shape: 32 query and 8 KV heads, head dim 128, w = 1024, bfloat16. All is replayed as CUDA graphs. A graph
holds several layers, each with its own cache, so that none of them finds its keys in the L2 cache of the GPU. The new
key always pushes another out. Each figure is minimum, median and maximum of several medians by Triton's `do_bench`.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import describe, write_tables
from gpu_attention import time_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_kernels import DynamicMaskCache, KeyCache, NewKeys, fused_attention
from dma_kernels.decoding.dynamic_cache import StepBackend
from dma_lightning import DogeForCausalLM
from dma_lightning.cli.sizes import read_config

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 8, 128, 1024
DENSE = {1: [1 << n for n in (16, 17, 18, 19)], 32: [1 << 16, 1 << 17]}  # lengths by batch
BATCHES = [1, 4, 32]
CONTEXTS = [1 << n for n in (10, 12, 14, 16, 17, 18, 19)]
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
CHUNK = 1 << 15


def capture(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what a function launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def microseconds(function: Callable[[], Any], calls: int) -> list[float]:
    """Time per call of a function that makes several, as a CUDA graph."""
    graph = capture(function)
    return [1e3 * ms / calls for ms in time_ms(graph.replay)]


def make_inputs(batch: int, length: int) -> dict[str, Tensor | NewKeys]:
    """Arguments of `DynamicMaskCache.attend`, with random ranks."""
    q = torch.randn(batch, HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    ranks = torch.randn(batch, KV_HEADS, length, device="cuda")
    return {"q": q, "new": NewKeys(k, v, ranks.sin(), ranks)}


def filled_cache(batch: int, length: int, backend: StepBackend = "triton") -> DynamicMaskCache:
    """A cache that has read so many positions."""
    cache = DynamicMaskCache(batch, KV_HEADS, HEAD_DIM, WINDOW, dtype=torch.bfloat16, device="cuda", backend=backend)
    for start in range(0, length, CHUNK):
        cache.attend(**make_inputs(batch, min(CHUNK, length - start)), attention=fused_attention)
    return cache


def check() -> None:
    """The kernel leaves what the plain step leaves, before anything is timed."""
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
    """A step of every cache."""
    for cache in caches:
        cache.attend(**inputs)


def dense_all(q: Tensor, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Dense attention of a query to all keys and values."""
    for k, v in kv:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def measure_steps() -> Iterator[dict[str, Any]]:
    """A layer's step by batch, and dense attention to as many keys, which keeps nothing."""
    for batch in BATCHES:
        layers = 4 if batch > 4 else 16
        inputs = make_inputs(batch, 1)
        inputs["new"].rank.fill_(9.0)  # of equal ranks the new one wins
        row: dict[str, Any] = {"batch": batch, "window": WINDOW}
        for name in ("triton", "torch"):
            caches = [filled_cache(batch, 2 * WINDOW, name) for _ in range(layers)]
            row[name] = microseconds(partial(step_all, caches, inputs), layers)
        kv = [(cache.key, cache.value) for cache in caches]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            row["FlashAttention-2, w keys"] = microseconds(partial(dense_all, inputs["q"], kv), layers)
        yield row


def measure_dense() -> Iterator[dict[str, Any]]:
    """Dense attention of one query to a full cache, which is not extended."""
    for batch, lengths in DENSE.items():
        for length in lengths:
            q = torch.randn(batch, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            k, v = torch.randn(2, batch, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            row: dict[str, Any] = {"batch": batch, "length": length, "gib": 2 * k.nbytes / 2**30}
            for name, backend in BACKENDS.items():
                with sdpa_kernel(backend):
                    row[name] = microseconds(partial(dense_all, q, [(k, v)]), 1)
            yield row


def measure_contexts() -> Iterator[dict[str, Any]]:
    """A layer's step, and the memory of its cache, after so many positions."""
    for length in CONTEXTS:
        caches = [filled_cache(1, length) for _ in range(16)]
        inputs = make_inputs(1, 1)
        state = caches[0].state_dict().values()
        times = microseconds(partial(step_all, caches, inputs), len(caches))
        yield {"length": length, "us": times, "mib": sum(x.nbytes for x in state) / 2**20}


def next_token(model: DogeForCausalLM, token: Tensor, cache: Sequence[KeyCache]) -> None:
    """Replace a token `[1, 1]` by the likeliest to follow it."""
    token.copy_(model(token, cache=cache, last_only=True).argmax(-1))


@torch.no_grad()
def measure_model(path: Path) -> Iterator[dict[str, Any]]:
    """A token of a whole model with random weights: eagerly, as a CUDA graph, and the memory of all caches."""
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
        graph = time_ms(capture(step).replay)
        state = [x for layer in cache for x in layer.state_dict().values()]
        row: dict[str, Any] = {
            "parameters": model.num_parameters,
            "length": length,
            "eager": eager,
            "CUDA graph": graph,
        }
        yield row | {"mib": sum(x.nbytes for x in state) / 2**20}


def main() -> None:
    """Check, measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "gpu_decode.json")
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "configs" / "model" / "1.7b.yaml")
    args = parser.parse_args()
    check()
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "window": WINDOW}
    tables = {
        "steps": measure_steps(),
        "dense": measure_dense(),
        "contexts": measure_contexts(),
        "model": measure_model(args.model),
    }
    write_tables(args.out, {"environment": describe(), "shape": shape}, tables)


if __name__ == "__main__":
    main()
