"""Weights of a checkpoint compared with a model, before any memory is taken for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dma_lightning.checkpoints.sharded import sharded_weights


class Weight(NamedTuple):
    """What a weight must be to fit a model; precision may differ."""

    shape: tuple[int, ...]
    is_float: bool

    @classmethod
    def of(cls, tensor: torch.Tensor | TensorStorageMetadata) -> "Weight":
        """Of a tensor, or of an entry in the index of a sharded checkpoint."""
        if isinstance(tensor, TensorStorageMetadata):
            return cls(tuple(tensor.size), tensor.properties.dtype.is_floating_point)
        return cls(tuple(tensor.shape), tensor.is_floating_point())

    def __str__(self) -> str:
        return f"{'floating point' if self.is_float else 'other'} numbers of shape {self.shape}"


Weights = dict[str, Weight]  # by name

EMBEDDING = "model.embed_tokens.weight"
_LAYERS = "model.layers."


def saved_weights(saved: Mapping[str, Any], path: Path) -> Weights:
    """The weights of a checkpoint, in a file or a folder."""
    found = sharded_weights(path) if path.is_dir() else saved.get("state_dict", {})
    return {name: Weight.of(weight) for name, weight in found.items()}


def model_weights(kind: type[pl.LightningModule], arguments: Mapping[str, Any]) -> Weights:
    """The weights that a model of these arguments has.

    Raises:
        ValueError: if there is no such model, or its weights are larger than any memory.
    """
    try:
        with torch.device("meta"):
            return {name: Weight.of(weight) for name, weight in kind(**arguments).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"expected sizes of a model, got ones that are too large ({reason})") from error


def layers_in(weights: Weights) -> int:
    """Number of layers that have weights."""
    return len({name.removeprefix(_LAYERS).partition(".")[0] for name in weights if name.startswith(_LAYERS)})


def check_layers(weights: Weights, layers: int, path: Path) -> None:
    """Compare the number of layers, which needs no model: one of ten million would take hours to make.

    Raises:
        ValueError: if it differs.
    """
    if (found := layers_in(weights)) != layers:
        raise ValueError(
            f"{path}: hyper_parameters.num_hidden_layers: expected {found}, which have weights there, got {layers}"
        )


def check_arguments(
    found: Weights, kind: type[pl.LightningModule], arguments: Mapping[str, Any], path: Path, strict: bool = True
) -> None:
    """Compare the weights of a checkpoint with those of a model of these arguments.

    Args:
        found: of the checkpoint.
        kind: class of the model.
        arguments: of the model.
        path: of the checkpoint, for messages.
        strict: whether all weights of either must be in the other, too.

    Raises:
        ValueError: if there is no such model, or they differ.
    """
    try:
        expected = model_weights(kind, arguments)
    except ValueError as error:
        raise ValueError(f"{path}: hyper_parameters: {error}") from error
    compare_weights(found, expected, path, strict)


def compare_weights(found: Weights, expected: Weights, path: Path, strict: bool) -> None:
    """Compare the weights of a checkpoint with those of a model.

    Args:
        found: of the checkpoint.
        expected: of the model.
        path: of the checkpoint, for messages.
        strict: whether all weights of either must be in the other, too.

    Raises:
        ValueError: if they differ, with the first that does.
    """
    names = found.keys() | expected.keys() if strict else found.keys() & expected.keys()
    differ = (name for name in sorted(names) if found.get(name) != expected.get(name))
    if (name := next(differ, None)) is not None:
        wanted, got = (x.get(name, "no such weight") for x in (expected, found))
        raise ValueError(f"{path}: state_dict.{name}: expected {wanted}, as hyper_parameters say, got {got}")
