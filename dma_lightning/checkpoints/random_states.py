"""States of random numbers, so that a resumed run draws what the uninterrupted one does."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from dma_lightning.trainer_state import random_states, set_random_states


def rng_states(trainer: pl.Trainer) -> dict[str, Any]:
    """Of this process, without arrays, which a safe load refuses; of GPUs, its own alone."""
    states, device = random_states(), trainer.strategy.root_device
    name, keys, *rest = states["numpy"]
    states["numpy"] = (name, keys.tolist(), *rest)
    return states | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_rng_states(states: list[dict[str, Any]], trainer: pl.Trainer) -> None:
    """Go on with those that a checkpoint has of all processes, in the order of their ranks; else with the seed's.

    Raises:
        ValueError: if they are no states.
    """
    if len(states) == trainer.world_size:
        own = states[trainer.global_rank]
        try:
            set_random_states(own)
            if "device" in own and trainer.strategy.root_device.type == "cuda":
                torch.cuda.set_rng_state(own["device"], trainer.strategy.root_device)
        except (TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{trainer.ckpt_path}: rng_states: expected states of random numbers, got others ({error!r})"
            ) from error
    else:
        rank_zero_warn(
            f"the checkpoint is of {len(states)} processes and this run of {trainer.world_size}: "
            "random numbers (of dropout) go on from the seed instead"
        )
