"""Decoding on a CPU: time per token and memory of the small cache and the full cache, by length of the text.

The model is the tiny one of `make train`, with w = 64 and untrained weights that make the ranks differ. Batch 1,
float32. The prompt is read in chunks, then tokens are generated one by one. Each time is the median [min - max] over
these tokens, except the first two.
"""

import time
from collections.abc import Iterator, Sequence

import torch

from dma_kernels import DynamicMaskCache, KeyCache
from dma_lightning import DogeForCausalLM, ModelConfig
from harness import CommandLine, Part, Result, Row, Table, describe, record, spread
from harness.tables import cpu_of, interval, length_of

LENGTHS = [1 << 10, 1 << 12, 1 << 14, 1 << 16]
TOKENS = {"small": 100, "full": 10}


def make_model() -> DogeForCausalLM:
    """The tiny model, with random weights that make the ranks differ."""
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
def measure(model: DogeForCausalLM, lengths: Sequence[int]) -> Iterator[Row]:
    """One row for each length and cache."""
    for length in lengths:
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
            row = {"length": length, "cache": name, "ms": spread(1e3 * x for x in seconds[2:])}
            yield row | {"mb": sum(map(cache_bytes, cache)) / 1e6}


def tables(result: Result) -> list[Part]:
    """What the pages show: both caches by length."""
    rows = result["decode"]
    return [
        Table(
            zip(rows[::2], rows[1::2], strict=True),
            "**`python benchmarks/cpu_decode.py`**: time per decoded token on a CPU, and size of the cache, with the "
            "tiny model; lower is better. w = 64, batch 1, float32. For comparison, the full cache repeats the "
            f"whole selection at every token. Median [min - max] ({cpu_of(result)}).",
            ["tokens read", "small cache, ms per token", "MB", "full cache, ms per token", "MB"],
            lambda pair: [length_of(pair[0]), *(x for row in pair for x in (interval(row["ms"]), f"{row['mb']:.2f}"))],
            labels=0,
        )
    ]


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "cpu_decode", duration="about three minutes on two cores")
    line.add_lengths(LENGTHS)
    args = line.parse_args()
    record(args.out, {"environment": describe()}, {"decode": measure(make_model(), args.lengths)}, tables)


if __name__ == "__main__":
    main()
