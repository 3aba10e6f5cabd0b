"""Comparing a checkpoint's weights with a model's before allocating memory for the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dma_lightning.checkpoints.sharded import sharded_weights


class Weight(NamedTuple):
    """Properties that a weight must have to fit a model; precision may differ."""

    shape: tuple[int, ...]
    is_float: bool

    @classmethod
    def of(cls, tensor: torch.Tensor | TensorStorageMetadata) -> "Weight":
        """Properties of a tensor, or of an entry in a sharded checkpoint's index."""
        if isinstance(tensor, TensorStorageMetadata):
            return cls(tuple(tensor.size), tensor.properties.dtype.is_floating_point)
        return cls(tuple(tensor.shape), tensor.is_floating_point())

    def __str__(self) -> str:
        return f"{'floating point' if self.is_float else 'other'} numbers of shape {self.shape}"


Weights = dict[str, Weight]  # by name

EMBEDDING = "model.embed_tokens.weight"
_LAYERS = "model.layers."


def saved_weights(saved: Mapping[str, Any], path: Path) -> Weights:
    """Weights in a checkpoint, which is a file or a folder."""
    found = sharded_weights(path) if path.is_dir() else saved.get("state_dict", {})
    return {name: Weight.of(weight) for name, weight in found.items()}


def model_weights(kind: type[pl.LightningModule], arguments: Mapping[str, Any]) -> Weights:
    """Weights of a model with these arguments.

    Raises:
        ValueError: if the arguments are invalid, or the weights are too large for any memory.
    """
    try:
        with torch.device("meta"):
            return {name: Weight.of(weight) for name, weight in kind(**arguments).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"expected sizes of a model, got sizes that are too large ({reason})") from error


def layers_in(weights: Weights) -> int:
    """Number of layers that have weights."""
    return len({name.removeprefix(_LAYERS).partition(".")[0] for name in weights if name.startswith(_LAYERS)})


def check_layers(weights: Weights, layers: int, path: Path) -> None:
    """Compare the number of layers without building a model: one with ten million layers would take hours to build.

    Raises:
        ValueError: if the numbers differ.
    """
    if (found := layers_in(weights)) != layers:
        raise ValueError(
            f"{path}: hyper_parameters.num_hidden_layers: expected {found}, the layers with weights, got {layers}"
        )


def check_arguments(
    found: Weights, kind: type[pl.LightningModule], arguments: Mapping[str, Any], path: Path, strict: bool = True
) -> None:
    """Compare a checkpoint's weights with those of a model with these arguments.

    Args:
        found: weights of the checkpoint.
        kind: class of the model.
        arguments: arguments of the model.
        path: path of the checkpoint, for messages.
        strict: whether both must have the same weight names; otherwise only shared names are compared.

    Raises:
        ValueError: if the arguments are invalid, or the weights differ.
    """
    try:
        expected = model_weights(kind, arguments)
    except ValueError as error:
        raise ValueError(f"{path}: hyper_parameters: {error}") from error
    compare_weights(found, expected, path, strict)


def compare_weights(found: Weights, expected: Weights, path: Path, strict: bool) -> None:
    """Compare a checkpoint's weights with a model's.

    Args:
        found: weights of the checkpoint.
        expected: weights of the model.
        path: path of the checkpoint, for messages.
        strict: whether both must have the same weight names; otherwise only shared names are compared.

    Raises:
        ValueError: if they differ; the message names the first weight that does.
    """
    names = found.keys() | expected.keys() if strict else found.keys() & expected.keys()
    differ = (name for name in sorted(names) if found.get(name) != expected.get(name))
    if (name := next(differ, None)) is not None:
        wanted, got = (x.get(name, "no such weight") for x in (expected, found))
        raise ValueError(f"{path}: state_dict.{name}: expected {wanted}, as in hyper_parameters, got {got}")
