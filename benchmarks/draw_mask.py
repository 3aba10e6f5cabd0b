"""Draw the README's picture: the dynamic mask of one head, `python benchmarks/draw_mask.py` (needs Matplotlib)."""

from pathlib import Path

import torch

from dma_flex import Lifetimes


def main() -> None:
    """Ranks that wander, as those of real text do, and the mask they make."""
    torch.manual_seed(1)
    ranks = torch.randn(96)
    for t in range(1, 96):
        ranks[t] += 0.4 * ranks[t - 1]
    path = Path(__file__).parent / "figures" / "mask.png"
    path.parent.mkdir(exist_ok=True)
    Lifetimes.top_w(ranks[None, None], keep_window_size=24).draw(block_size=8).savefig(path, dpi=110)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
