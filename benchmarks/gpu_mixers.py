"""Training steps of whole models with each attention, in one run on one GPU.

    python benchmarks/gpu_mixers.py

A step is forward, loss, backward and fused AdamW on 32,768 random tokens in sequences of one length, in bfloat16 with
float32 master weights. Layers of 80m are compiled; those of 1.7b are not, and are computed again for the backward,
since their activations would not fit. `mha` and `mla` take cuDNN's attention where it can. Each figure is minimum,
median and maximum of several steps; memory is the peak of a step.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import describe, write_tables
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_lightning import DogeForCausalLM
from dma_lightning.cli.sizes import read_config
from dma_lightning.mixers import MIXERS

ROOT = Path(__file__).parents[1]
TOKENS, LENGTHS, VOCABULARY = 32768, [4096, 16384, 32768], 32768
COMPILED, RECOMPUTED = "80m", "1.7b"
STEPS = {COMPILED: 5, RECOMPUTED: 3}
SDPA = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def measure(shapes: list[str], lengths: list[int], names: list[str]) -> Iterator[dict[str, Any]]:
    """One row by shape, length and attention."""
    cases = list(product(shapes, lengths, names))
    ahead = [case for case in cases if case[0] == COMPILED]
    if ahead:  # into Inductor's cache, which the measurement reads
        with ProcessPoolExecutor(len(ahead), mp_context=multiprocessing.get_context("spawn")) as pool:
            for case, error in zip(ahead, pool.map(compile_ahead, *zip(*ahead, strict=True)), strict=True):
                if error:
                    print(f"{case}: {error}", flush=True)
    for shape, length, name in cases:
        row = {"shape": shape, "length": length, "attention": name}
        try:
            row |= measure_step(shape, length, name)
        except RuntimeError as error:  # out of memory, mostly
            row["error"] = str(error)[:200]
        torch.compiler.reset()
        torch.cuda.empty_cache()
        yield row


def compile_ahead(shape: str, length: int, name: str) -> str | None:
    """Compile what `measure_step` does, with one layer, since the layers of a model share it; an error as text."""
    try:
        measure_step(shape, length, name, num_hidden_layers=1, vocab_size=256)
    except Exception as error:
        return str(error)[-300:]
    return None


def measure_step(shape: str, length: int, name: str, **changes: int) -> dict[str, Any]:
    """Milliseconds of a step, its tokens per second and FLOPs, and its peak memory in GiB."""
    torch.manual_seed(0)
    config = read_config(ROOT / "configs" / "model" / f"{shape}.yaml")
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": length} | changes
    config = replace(config, attention=name, **changes)
    with torch.device("cuda"):
        model = DogeForCausalLM(config)
        tokens = torch.randint(config.vocab_size, (TOKENS // length, length + 1))
    flops = model.flops_per_token * TOKENS
    for i, layer in enumerate(model.layers):
        if shape == COMPILED:
            layer.compile(dynamic=False)
        if shape == RECOMPUTED:
            model.layers[i] = checkpoint_wrapper(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with sdpa_kernel(SDPA, set_priority=True):
        step()
        if shape == COMPILED:
            step()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(STEPS[shape]):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": [min(times), statistics.median(times), max(times)], "teraflops": flops / 1e12, "peak_gib": peak}


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--attentions", nargs="*", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_mixers.json")
    args = parser.parse_args()
    steps = measure(args.shapes, args.lengths, args.attentions)
    write_tables(args.out, {"environment": describe()}, {"steps": steps})


if __name__ == "__main__":
    main()
