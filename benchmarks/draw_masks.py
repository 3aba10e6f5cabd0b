"""Draw the pictures of README and docs/own-model.md: one mask, and one of every kind (needs Matplotlib)."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from dma_flex import Lifetimes

FIGURES = Path(__file__).parent / "figures"
LENGTH = 96


def wandering_ranks() -> torch.Tensor:
    """Ranks that wander, as those of real text do, `[1, 1, N]`."""
    torch.manual_seed(1)
    ranks = torch.randn(LENGTH)
    for t in range(1, LENGTH):
        ranks[t] += 0.4 * ranks[t - 1]
    return ranks[None, None]


def masks_of_every_kind() -> dict[str, Lifetimes]:
    """Masks by the expression that makes them."""
    n, ranks = LENGTH, wandering_ranks()
    documents = torch.arange(n)[None] // 37
    padding = torch.arange(n)[None] < 14
    return {
        "causal(n)": Lifetimes.causal(n),
        "sliding_window(n, 24)": Lifetimes.sliding_window(n, 24),
        "causal(n, documents=ids)": Lifetimes.causal(n, documents=documents),
        "sinks(n, 6) | last(n, 24)": Lifetimes.sinks(n, 6) | Lifetimes.last(n, 24),
        "top_w(ranks, 24)": Lifetimes.top_w(ranks, 24),
        "top_w(ranks, 24, documents=ids)": Lifetimes.top_w(ranks, 24, documents=documents),
        "top_w(ranks, 16, keep_last=8, sinks=4)": Lifetimes.top_w(ranks, 16, keep_last=8, sinks=4),
        "top_w(ranks, 24, padding=left)": Lifetimes.top_w(ranks, 24, padding=padding),
        "top_w(ranks, 24) & last(n, 48)": Lifetimes.top_w(ranks, 24) & Lifetimes.last(n, 48),
    }


def main() -> None:
    """Write both pictures."""
    FIGURES.mkdir(exist_ok=True)
    Lifetimes.top_w(wandering_ranks(), 24).draw(block_size=8).savefig(FIGURES / "mask.png", dpi=110)
    figure = Figure(figsize=(10.5, 10.8), layout="constrained")
    for axes, (name, mask) in zip(figure.subplots(3, 3).flat, masks_of_every_kind().items(), strict=True):
        mask.draw(block_size=8, axes=axes)
        axes.set(xlabel="", ylabel="", xticks=[], yticks=[])
        axes.set_title(name, fontsize=10, family="monospace")
    figure.savefig(FIGURES / "masks.png", dpi=75)
    print(f"written to {FIGURES}")


if __name__ == "__main__":
    main()
