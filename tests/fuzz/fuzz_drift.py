"""Ranks with a drift against Python's integers: selections, and caches that begin far into a text.

B batch, G KV heads, N length.
"""

import random
from dataclasses import dataclass, replace

import drifting
import numpy as np
import torch
from fuzz_backends import AttentionCase
from fuzz_caches import Reading
from fuzz_draws import DEVICE, Packing, draw_length, draw_window
from fuzz_oracles import Kept
from fuzz_told import told
from torch import Tensor

from dma_kernels import Lifetimes, reference_mask

_STARTS = (0, 0, 10_000_000 * 8 << 32, (1 << 60) + 12345, drifting.LARGEST - (1 << 36))  # units


@dataclass(frozen=True)
class DriftCase:
    """Contents and steps `[B, G, N]`, in nats."""

    kind: str
    content: Tensor
    steps: Tensor
    packing: Packing

    @classmethod
    def drawn(cls, rng: random.Random, shape: tuple[int, ...], packing: Packing) -> "DriftCase":
        kind, dtype = rng.choice(drifting.KINDS), rng.choice((torch.float32, torch.float64, torch.bfloat16))
        torch.manual_seed(rng.getrandbits(32))
        return cls(kind, *drifting.draw(kind, shape, dtype), packing)

    def ranks(self, start: int = 0) -> list[list[list[int]]]:
        """Ranks by the definition, as Python's integers."""
        return [
            [
                drifting.integer_ranks(content.tolist(), steps.tolist(), self.packing.row(b)[1], start)
                for content, steps in zip(self.content[b], self.steps[b], strict=True)
            ]
            for b in range(len(self.content))
        ]

    def sums(self) -> Tensor:
        """D, the sum of the steps, in nats, float64."""
        rows = [
            [drifting.sums(x.tolist(), self.packing.row(b)[1]) for x in self.steps[b]] for b in range(len(self.steps))
        ]
        return torch.tensor(rows, dtype=torch.int64).double() / 2**32

    def __str__(self) -> str:
        return f"drift {self.kind}, {list(self.content.shape)} {self.content.dtype}, {self.packing}"


def check_drift(seed: int) -> None:
    """`Lifetimes.top_w` and `reference_mask`, with a drift and with integer ranks."""
    rng = random.Random(seed)
    batch, kv_heads, length = rng.choice((1, 1, 2)), rng.randint(1, 2), draw_length(rng)
    case = DriftCase.drawn(rng, (batch, kv_heads, length), Packing.drawn(rng, batch, length))
    kept = Kept(draw_window(rng, length), rng.choice((0, 0, 1, 3, length + 2)), rng.choice((0, 0, 1, 4)))
    with told(seed, f"{case}, {kept}"):
        start = rng.choice(_STARTS)
        ranks, far = case.ranks(), case.ranks(start)
        options = {"keep_last": kept.keep_last, "sinks": kept.sinks, **case.packing.arguments(DEVICE)}
        for numbers, arguments in ((ranks, {"drift": case.steps.to(DEVICE)}), (far, {})):
            expected = np.array(
                [[kept.mask(x, *case.packing.row(b)) for x in row] for b, row in enumerate(numbers)]
            )  # fmt: skip
            given = (case.content if arguments else torch.tensor(numbers)).to(DEVICE)
            mask = Lifetimes.top_w(given, kept.window, **options, **arguments)
            assert np.array_equal(mask.to_dense().cpu().numpy(), expected), f"top_w, {list(arguments)}"
            dense = reference_mask(given, kept.window, **options, **arguments)
            assert np.array_equal(dense.cpu().numpy(), expected), f"reference_mask, {list(arguments)}"


def check_drift_caches(seed: int) -> None:
    """Caches of keys with a drift: arbitrary calls, partly accepted guesses, and selected rows."""
    _check_cache(seed, torch.float64, ("dynamic", "dynamic", "dynamic", "full"), longest=100)


def check_drift_triton_caches(seed: int) -> None:
    """The same, with a Triton kernel for steps of one position."""
    _check_cache(seed, torch.float32, ("triton",), longest=30)


def _check_cache(seed: int, dtype: torch.dtype, kinds: tuple[str, ...], longest: int) -> None:
    rng = random.Random(seed)
    case = AttentionCase.drawn(rng, dtype, longest=longest)
    drift = DriftCase.drawn(rng, tuple(case.ranks.shape), case.packing)
    if dtype == torch.float32:  # 2^29 nats from all of its keys, a query would see them rounded to 32 nats
        drift = replace(drift, steps=drift.steps.clamp(max=8))
    start, kind = rng.choice(_STARTS), rng.choice(kinds)
    scores = case.inputs[3].double() + drift.sums()
    kept = replace(case.kept, window=min(case.kept.window, 60))
    case = replace(
        case, scale=None, kept=kept, ranks=torch.tensor(drift.ranks(start)), inputs=[*case.inputs[:3], scores]
    )
    with told(seed, f"{kind} cache, {case}, {drift}, from {start}"):
        reading = Reading(case, kind, drift.sums(), start / 2**32)
        while reading.left:
            reading.call(rng)
