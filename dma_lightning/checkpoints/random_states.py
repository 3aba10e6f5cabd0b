"""Random states, so that a resumed run draws the same numbers as an uninterrupted one."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from dma_lightning.trainer_state import random_states, set_random_states


def rng_states(trainer: pl.Trainer) -> dict[str, Any]:
    """Random states of this process and its own GPU, without arrays, because a safe load refuses arrays."""
    states, device = random_states(), trainer.strategy.root_device
    name, keys, *rest = states["numpy"]
    states["numpy"] = (name, keys.tolist(), *rest)
    return states | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_rng_states(states: list[dict[str, Any]], trainer: pl.Trainer) -> None:
    """Restore this process's random states from a checkpoint.

    If the number of processes has changed, warn and continue from the seed.

    Args:
        states: one for each process, in the order of their ranks.
        trainer: the resumed run's.

    Raises:
        ValueError: if they are not random states.
    """
    if len(states) == trainer.world_size:
        own = states[trainer.global_rank]
        try:
            set_random_states(own)
            if "device" in own and trainer.strategy.root_device.type == "cuda":
                torch.cuda.set_rng_state(own["device"], trainer.strategy.root_device)
        except (TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{trainer.ckpt_path}: rng_states: expected random states, got others ({error!r})"
            ) from error
    else:
        rank_zero_warn(
            f"the checkpoint has {len(states)} processes and this run has {trainer.world_size}: "
            "random numbers (for dropout) continue from the seed instead"
        )
