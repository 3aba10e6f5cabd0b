"""How many far copies in a text can be made from the keys that a selection keeps. No model is involved.

    python benchmarks/far_copy_coverage.py FOLDER      of `dma-lightning prepare`

A far copy is a position whose last four tokens have appeared before, but only farther back than a window
(`far_copies`). It is covered if any head still keeps a token that followed these four there. Each rule ranks a key by
what is known when the key arrives. Only `foreseen` also knows the text that comes after it. All rules keep as many keys
as the window holds; a quarter of these are always the most recent ones.
"""

from collections import Counter, defaultdict

import torch
from torch import Tensor

from dma_kernels import KeepRule, Lifetimes
from dma_lightning.data.prepared import PreparedDataModule
from dma_lightning.monitoring.far_copies import far_copies
from harness import CommandLine, describe, record

ORDER = 4  # tokens that must have appeared before


def sources(row: Tensor, window: int) -> dict[int, list[int]]:
    """For each far copy in a row `[N]`: the positions that its next token could be copied from."""
    tokens = row.tolist()
    before: dict[tuple[int, ...], list[int]] = defaultdict(list)
    far, found = far_copies(row[None], window, order=ORDER)[0].tolist(), {}
    for t in range(ORDER - 1, len(tokens)):
        gram = tuple(tokens[t - ORDER + 1 : t + 1])
        if far[t]:
            found[t] = [p + 1 for p in before[gram]]
        before[gram].append(t)
    return found


def repeats(row: Tensor) -> Tensor:
    """How often the last four tokens at each position have appeared before, `[N]`."""
    tokens, seen, count = row.tolist(), Counter[tuple[int, ...]](), torch.zeros(len(row))
    for t in range(ORDER - 1, len(tokens)):
        gram = tuple(tokens[t - ORDER + 1 : t + 1])
        count[t] = seen[gram]
        seen[gram] += 1
    return count


def needs(found: dict[int, list[int]], length: int) -> Tensor:
    """How many far copies could use each position as their source, `[N]`."""
    count = torch.zeros(length)
    for positions in found.values():
        count[positions] += 1
    return count


def ranks_of(row: Tensor, found: dict[int, list[int]], rarity: Tensor, heads: int) -> dict[str, Tensor]:
    """Ranks `[G, N]` by each rule. If a rule has several heads, it is enough that one of them keeps a key."""
    position = torch.arange(len(row))
    stripes = (position % heads == torch.arange(heads)[:, None]).float()
    return {
        "random": torch.rand(1, len(row)),
        "rare tokens": rarity[row][None],
        "repeated": repeats(row)[None],
        "foreseen": needs(found, len(row))[None],
        f"random, {heads} heads": torch.rand(heads, len(row)),
        **{f"stripes, {m} of {heads} heads": stripes[:m] for m in range(1, heads + 1)},
    }


def coverage(rows: list[Tensor], window: int, rarity: Tensor, heads: int) -> list[dict[str, str | float]]:
    """The share of far copies that each rule covers, with the standard error of its mean over rows."""
    keep = KeepRule(window - window // 4, window // 4)
    shares: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if found := sources(row, window):
            for name, ranks in ranks_of(row, found, rarity, heads).items():
                death = Lifetimes.selected(ranks[None], keep).death[0]  # [G, N]
                kept = [bool((death[:, positions] > t).any()) for t, positions in found.items()]
                shares[name].append(sum(kept) / len(kept))
    means = {name: torch.tensor(x) for name, x in shares.items()}
    return [
        {"rule": name, "covered": round(x.mean().item(), 3), "error": round(x.std().item() / len(x) ** 0.5, 3)}
        for name, x in means.items()
    ]


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "far_copy_coverage", duration="about a minute on two cores")
    line.add_argument("folder", help="folder of prepared text")
    line.add_argument("--length", type=int, default=4096, help="tokens per row (default: 4096)")
    line.add_argument("--window", type=int, default=512, help="keys that each head keeps (default: 512)")
    line.add_argument("--heads", type=int, default=6, help="KV heads (default: 6)")
    line.add_argument("--rows", type=int, default=64, help="rows of the text, evenly spaced (default: 64)")
    args = line.parse_args()
    torch.manual_seed(0)
    data = PreparedDataModule(args.folder, args.length, separate_documents=False, batch_size=1)
    data.setup("fit")
    step = max(1, len(data.train_set) // args.rows)
    rows = [data.train_set[i * step]["input_ids"] for i in range(args.rows)]
    frequency = torch.bincount(torch.cat(rows), minlength=data.vocab_size) + 1.0
    result = {"environment": describe(), "length": args.length, "window": args.window, "rows": len(rows)}
    record(args.out, result, {"rules": coverage(rows, args.window, -frequency.log(), args.heads)})


if __name__ == "__main__":
    main()
