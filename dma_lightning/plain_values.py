"""Argument values that checkpoints can hold: numbers, text, and lists, tuples and dictionaries of these."""

import inspect
import os
from collections.abc import Mapping
from enum import Enum
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.core.mixins import HyperparametersMixin

from dma_lightning.trainer_state import set_initial_hparams


class PlainHyperparameters(HyperparametersMixin):
    """For Lightning's modules: saves their arguments as plain values, so that checkpoints can be read again."""

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **options: Any) -> None:
        """Save the arguments of `__init__`, as Lightning does.

        Args:
            *args: passed on to Lightning.
            frame: the call of `__init__`. Default: the caller.
            **options: passed on to Lightning.

        Raises:
            ValueError: if an argument cannot be made plain.
        """
        assert isinstance(self, pl.LightningModule | pl.LightningDataModule)
        caller = frame or getattr(inspect.currentframe(), "f_back", None)  # a frame stored in itself would leak
        super().save_hyperparameters(*args, frame=caller, **options)
        self.hparams.update(plain(dict(self.hparams), type(self).__name__))
        set_initial_hparams(self)


def plain(value: Any, what: str) -> Any:
    """Turn NumPy numbers, paths, enums and special containers into values that a checkpoint can hold.

    Args:
        value: an argument.
        what: its name, for the message.

    Raises:
        ValueError: if it is or contains anything else.
    """
    value = value.item() if isinstance(value, np.generic) else value.value if isinstance(value, Enum) else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key, what): plain(x, f"{what}.{key}") for key, x in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(plain(x, what) for x in value)
    if value is None:
        return None
    raise ValueError(f"{what}: expected numbers, text, or lists and dictionaries of them, got {value!r}")
