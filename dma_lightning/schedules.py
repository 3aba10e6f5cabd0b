"""Learning-rate schedules, per optimizer step."""

import math
from typing import Literal

Schedule = Literal["wsd", "cosine", "constant"]


def lr_factor(schedule: Schedule, step: int, max_steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Share of the peak learning rate at an optimizer step, counted from 0.

    `wsd` warms up linearly, stays, and falls linearly to 0 over the last `decay_fraction` of `max_steps`; `cosine`
    falls to 0 along a half wave after the warm-up; `constant` is 1 throughout, without warm-up.
    """
    if schedule == "constant":
        return 1.0
    warmup = round(max_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, max_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = round(max_steps * decay_fraction)
    return min(1.0, max(0.0, (max_steps - step) / max(1, decay)))
