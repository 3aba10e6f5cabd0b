"""Draw the pictures of README, DESIGN and docs/own-model.md (needs Matplotlib).

python benchmarks/draw_masks.py               one mask, and one of every kind
python benchmarks/draw_masks.py CHECKPOINT    the heads with the slowest and the fastest drift, over a real text;
                                              of a byte-level model, such as `make train` writes
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import cast

import torch
from matplotlib.figure import Figure

from dma_flex import Lifetimes
from dma_lightning import LanguageModel
from dma_lightning.data import Batch
from dma_lightning.monitoring.recording import masks_over

FIGURES = Path(__file__).parent / "figures"
LENGTH = 96


def wandering_ranks() -> torch.Tensor:
    """Ranks that change slowly along the sequence, as those of real text do, `[1, 1, N]`."""
    torch.manual_seed(1)
    ranks = torch.randn(LENGTH)
    for t in range(1, LENGTH):
        ranks[t] += 0.4 * ranks[t - 1]
    return ranks[None, None]


def masks_of_every_kind() -> dict[str, Lifetimes]:
    """One mask of every kind, under the expression that makes it."""
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


def _extremes(slopes: dict[tuple[int, int], float]) -> list[tuple[int, int]]:
    """The (layer, head) pairs with the smallest and the largest slope."""
    return [min(slopes, key=slopes.__getitem__), max(slopes, key=slopes.__getitem__)]


def draw_drifts(checkpoint: str) -> Figure:
    """Masks of the heads with the slowest and the fastest drift, over the beginning of a help topic."""
    model = LanguageModel.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).model.eval()
    text = torch.tensor([list(topics["with"].encode()[: model.config.max_position_embeddings])])
    with torch.no_grad():
        masks = masks_over(model, cast("Batch", {"input_ids": text}))
    slopes = {  # nats per position; contents are not in the biases, so these are the drift alone
        (layer, head): (bias[-1] - bias[0]).item() / (len(bias) - 1)
        for layer, mask in masks.items()
        for head, bias in enumerate(mask.scores[0])
    }
    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    for axes, (layer, head) in zip(figure.subplots(1, 2), _extremes(slopes), strict=True):
        masks[layer].lifetimes.draw(head=head, block_size=16, axes=axes)
        distance = 1 / slopes[layer, head]
        axes.set_title(f"layer {layer}, KV head {head}: a bias falls by 1 in {distance:.1f} positions", fontsize=9)
    return figure


def main() -> None:
    """Write the pictures."""
    FIGURES.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        draw_drifts(sys.argv[1]).savefig(FIGURES / "drifts.png", dpi=90)
        return
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
