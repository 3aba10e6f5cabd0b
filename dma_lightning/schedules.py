"""Learning-rate schedules, per optimizer step."""

import math
from typing import Literal, get_args

import lightning.pytorch as pl

Schedule = Literal["wsd", "cosine", "constant"]


def check_schedule(schedule: Schedule, warmup_fraction: float, decay_fraction: float) -> None:
    """Check the arguments of a schedule.

    Raises:
        ValueError: for an unknown schedule, or shares that are negative or exceed 1 in total.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule: expected one of {list(get_args(Schedule))}, got {schedule!r}")
    if min(warmup_fraction, decay_fraction) < 0 or warmup_fraction + decay_fraction > 1:
        raise ValueError(
            "warmup_fraction and decay_fraction: expected two shares of at most 1 in all, "
            f"got {warmup_fraction} and {decay_fraction}"
        )


def lr_factor(schedule: Schedule, step: int, max_steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Share of the peak learning rate at an optimizer step, counted from 0.

    `wsd` warms up linearly, stays, and falls linearly to 0 over the last `decay_fraction` of `max_steps`; `cosine`
    falls to 0 along a half wave after the warm-up; `constant` is always 1, without warm-up.
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


def total_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of the whole run, including those of a checkpoint; None if its end is unknown.

    With `trainer.max_epochs`, this makes the training data loader, if there is none yet. So a checkpoint's position in
    the data must be restored first.
    """
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 <= steps < float("inf") else None
