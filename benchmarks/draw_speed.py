"""Draw times by length from the GPU result files: `python benchmarks/draw_speed.py`."""

from typing import Any

from matplotlib.figure import Figure

from harness import ROOT, load

COLORS = {"triton": "#1b7837", "cuDNN": "#5e3c99", "FlashAttention-2": "#e08214"}
Points = dict[str, list[tuple[int, float]]]


def training(result: dict[str, Any]) -> Points:
    """Forward and backward, 16/4 heads, in microseconds per token: ours up to 1M, dense attention where measured."""
    points = {"triton": [(row["length"], 1e3 * row["ms"][1] / row["length"]) for row in result["lengths"]]}
    for name in ("cuDNN", "FlashAttention-2"):
        rows = [row for row in result["attention"] if row["heads"] == 16]
        points[name] = [(row["length"], 1e3 * row[name][1] / row["length"]) for row in rows]
    return points


def decoding(result: dict[str, Any]) -> Points:
    """A decoding step of one layer at batch 1, in microseconds."""
    points = {"triton": [(row["length"], row["us"][1]) for row in result["contexts"]]}
    for name in ("cuDNN", "FlashAttention-2"):
        points[name] = [(row["length"], row[name][1]) for row in result["dense"] if row["batch"] == 1]
    return points


def draw(points: Points, dense: str, xlabel: str, ylabel: str, name: str) -> None:
    """Lines over lengths, both axes logarithmic."""
    axes = Figure(figsize=(7, 3.6), layout="constrained").add_subplot()
    for key, pairs in points.items():
        label = f"{key}, w = 1024" if key == "triton" else f"{key}, {dense}"
        axes.plot(*zip(*pairs, strict=True), "o-", color=COLORS[key], label=label)
    ticks = [length for length, _ in points["triton"]]
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(ticks, [f"{length // 1024}k" for length in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(ROOT / "benchmarks" / "figures" / name, dpi=110)


def main() -> None:
    """Write both pictures."""
    training_label = "forward + backward, us per token"
    draw(training(load("gpu_kernels")), "dense causal", "N", training_label, "speed.png")
    draw(decoding(load("gpu_decode")), "all keys", "tokens read", "a layer's step, us", "decode.png")


if __name__ == "__main__":
    main()
