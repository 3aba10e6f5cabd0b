"""The table of README that shows dynamic mask attention beside dense attention; `readme_figures.py` writes it."""

from typing import Any

RESULTS = ["gpu_kernels"]
SHAPES = ((32, 8192, 1024), (32, 32_768, 1024), (16, 131_072, 2048))  # query heads, length, keys of a query


def tables(result: dict[str, Any]) -> list[str]:
    """Forward and backward pass at three lengths, and what was measured."""
    rows = {(row["heads"], row["length"], row["window"]): row for row in result["attention"]}
    lines = [
        "| sequence | keys per query | DMA | dense attention (cuDNN) | speedup |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in SHAPES:
        ours, dense = (rows[shape][name][1] for name in ("triton", "cuDNN"))
        lines.append(f"| {shape[1]:,} | {shape[2]:,} | {ours:.3g} ms | {dense:.3g} ms | {dense / ours:.1f}x |")
    heads = [f"{rows[shape]['heads']} query and {rows[shape]['kv_heads']} KV heads" for shape in SHAPES]
    caption = (
        f"*Forward and backward pass of one attention layer on an {result['environment']['gpu']}, selection included:\n"
        f"bfloat16, head dim 128, `triton` backend, {heads[0]} ({heads[-1]} in the last row).\n"
        "See [all measurements](docs/benchmarks.md).*"
    )
    return ["\n".join(lines), caption]
