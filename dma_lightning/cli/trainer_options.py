"""Trainer options that Lightning checks late or with long messages."""

import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from dma_lightning.closest import did_you_mean


def check_trainer_options(options: Namespace) -> None:
    """Check that Lightning knows accelerator and strategy, and that the machine has the accelerator.

    Raises:
        ValueError: if not.
    """
    strategy, known = options.strategy, ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
        raise ValueError(
            f"trainer.strategy: expected a name such as auto, ddp or fsdp, or a class as in -c trainer/fsdp, "
            f"got {strategy!r}{did_you_mean(strategy, known)}"
        )
    accelerator = options.accelerator
    if isinstance(accelerator, str) and accelerator != "auto":
        _check_accelerator(accelerator)


def _check_accelerator(name: str) -> None:
    known = AcceleratorRegistry.available_accelerators()
    if name not in (names := {*known, "auto", "gpu"}):
        raise ValueError(
            f"trainer.accelerator: expected one of {sorted(names)}, got {name!r}{did_you_mean(name, names)}"
        )
    here = [x for x in known if AcceleratorRegistry[x]["accelerator"].is_available()]
    if name in here or (name == "gpu" and {"cuda", "mps"} & set(here)):
        return
    only_cpu = name in ("gpu", "cuda") and torch.version.cuda is None and torch.version.hip is None
    build = f" (torch {torch.__version__} is a build without GPUs)" if only_cpu else ""
    raise ValueError(
        f"trainer.accelerator: expected what this machine has, {' or '.join(sorted(here))}, got {name!r}{build}; give "
        "--trainer.accelerator auto, or -c trainer/cpu in place of a config for GPUs"
    )
