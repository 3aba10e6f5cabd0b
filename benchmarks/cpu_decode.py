"""Time per token and memory of decoding on a CPU by the length of the text, small cache and full.

    python benchmarks/cpu_decode.py      a JSON file under benchmarks/results/

The tiny model of `make train` with w = 64 and untrained weights that spread the ranks; batch 1, float32. The prompt is
read in chunks, then tokens are made one by one; median [min - max] of them.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from environment import describe, write_tables

from dma_kernels import DynamicMaskCache, KeyCache
from dma_lightning import DogeForCausalLM, ModelConfig

LENGTHS = [1 << 10, 1 << 12, 1 << 14, 1 << 16]
TOKENS = {"small": 100, "full": 10}


def make_model() -> DogeForCausalLM:
    """The tiny model, with ranks that differ."""
    torch.manual_seed(0)
    model = DogeForCausalLM(ModelConfig()).eval()
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
        torch.nn.init.normal_(layer.self_attn.dt_proj.weight)
    return model


def cache_bytes(cache: KeyCache) -> int:
    """Memory of a cache's tensors."""
    tensors = cache.state_dict() if isinstance(cache, DynamicMaskCache) else cache._kept
    return sum(x.numel() * x.element_size() for x in tensors.values())


@torch.no_grad()
def measure(model: DogeForCausalLM) -> Iterator[dict[str, Any]]:
    """One row by length and cache."""
    for length in LENGTHS:
        tokens = torch.randint(256, (1, length))
        for name, count in TOKENS.items():
            cache, seconds = model.new_cache(1, full=name == "full"), []
            for part in tokens.split(4096, dim=1):
                logits = model(part, cache=cache, last_only=True)
            for _ in range(count):
                token = logits[:, -1:].argmax(-1)
                start = time.perf_counter()
                logits = model(token, cache=cache, last_only=True)
                seconds.append(time.perf_counter() - start)
            ms = sorted(1e3 * x for x in seconds[2:])
            row = {"length": length, "cache": name, "ms": [ms[0], ms[len(ms) // 2], ms[-1]]}
            yield row | {"mb": sum(map(cache_bytes, cache)) / 1e6}


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_decode.json")
    args = parser.parse_args()
    write_tables(args.out, {"environment": describe()}, {"decode": measure(make_model())})


if __name__ == "__main__":
    main()
