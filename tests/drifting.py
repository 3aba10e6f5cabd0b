"""Contents and steps of many kinds, and their ranks as Python's integers, which cannot overflow."""

import math
from fractions import Fraction

import torch
from torch import Tensor

LARGEST = 2**61  # units, of a content and of a sum of steps
NAN_RANK = 2**63 - 1
KINDS = ["gates", "none", "fast", "tiny", "mixed", "special"]
_SPECIAL_STEPS = (0.0, 8.0, math.nan, 2.0**-33, 3 * 2.0**-33, 1e-12, math.inf, 1e300, 2.0**28, 0.6931471805599453)
_SPECIAL_CONTENTS = (0.0, -0.0, math.nan, math.inf, -math.inf, 2.0**-32, -(2.0**-33), 5e8, -6e8, 1.0)


def units(nats: float) -> int:
    """A number of nats, which is not NaN, in whole units of 2^-32 nats."""
    whole = math.copysign(LARGEST, nats) if math.isinf(nats) else round(Fraction(nats) * 2**32)
    return max(-LARGEST, min(LARGEST, int(whole)))


def sums(steps: list[float], padding: list[bool] | None = None, start: int = 0) -> list[int]:
    """D, the sum of the steps so far, at every position, in units of 2^-32 nats."""
    total, found = start, []
    for t, step in enumerate(steps):
        counts = not math.isnan(step) and not (padding is not None and padding[t])
        total = min(LARGEST, total + (max(0, units(step)) if counts else 0))
        found.append(total)
    return found


def integer_ranks(
    content: list[float], steps: list[float], padding: list[bool] | None = None, start: int = 0
) -> list[int]:
    """Ranks of one head."""
    drifted = sums(steps, padding, start)
    return [NAN_RANK if math.isnan(c) else units(c) + d for c, d in zip(content, drifted, strict=True)]


def draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Contents and steps of a kind: as gates begin, none, fast, too small to count, mixed, or special values."""
    content, steps = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) / 16
    if kind == "none":
        content, steps = content.mul(2).round(), torch.zeros_like(steps)
    elif kind == "fast":
        steps = torch.where(steps < 1 / 32, 8.0, 0.0)
    elif kind == "tiny":
        content, steps = torch.zeros_like(content), steps * 2.0**-28
    elif kind == "mixed":
        content, steps = content.round() * 4, (steps * 32).round().exp2() - 1
    elif kind == "special":
        content, steps = (
            torch.tensor(x, dtype=dtype)[torch.randint(len(x), shape)] for x in (_SPECIAL_CONTENTS, _SPECIAL_STEPS)
        )
    return content, steps
