"""Draw the time per token by length from benchmarks/results/gpu_kernels.json: `python benchmarks/draw_speed.py`."""

from matplotlib.figure import Figure
from readme_figures import ROOT, load

COLORS = {"triton": "#1b7837", "cuDNN": "#5e3c99", "FlashAttention-2": "#e08214"}


def main() -> None:
    """Microseconds per token of forward and backward, 16/4 heads: ours up to 1M, and dense attention where measured."""
    result = load("gpu_kernels")
    axes = Figure(figsize=(7, 3.6), layout="constrained").add_subplot()
    points = {"triton": [(row["length"], row["ms"][1]) for row in result["lengths"]]}
    for name in ("cuDNN", "FlashAttention-2"):
        rows = [row for row in result["attention"] if row["heads"] == 16]
        points[name] = [(row["length"], row[name][1]) for row in rows]
    for name, pairs in points.items():
        label = f"{name}, w = 1024" if name == "triton" else f"{name}, dense causal"
        axes.plot([n for n, _ in pairs], [1e3 * ms / n for n, ms in pairs], "o-", color=COLORS[name], label=label)
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="forward + backward, us per token")
    axes.set_xticks([2**i for i in range(14, 21)], [f"{2**i // 1024}k" for i in range(14, 21)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(ROOT / "benchmarks" / "figures" / "speed.png", dpi=110)


if __name__ == "__main__":
    main()
