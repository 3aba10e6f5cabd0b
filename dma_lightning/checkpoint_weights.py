"""Weights of a checkpoint compared with a model, before any memory is taken for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dma_lightning.sharded_checkpoints import sharded_shapes

Shapes = dict[str, torch.Size]  # of weights, by name

EMBEDDING = "model.embed_tokens.weight"
_LAYERS = "model.layers."


def saved_shapes(saved: Mapping[str, Any], path: Path) -> Shapes:
    """Names and shapes of a checkpoint's weights, in a file or a folder."""
    if path.is_dir():
        return sharded_shapes(path)
    return {name: weight.shape for name, weight in saved.get("state_dict", {}).items()}


def model_shapes(kind: type[pl.LightningModule], arguments: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the weights that a model of these arguments has.

    Raises:
        ValueError: if there is no such model, or its weights are larger than any memory.
    """
    try:
        with torch.device("meta"):
            return {name: weight.shape for name, weight in kind(**arguments).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"expected sizes of a model, got ones that are too large ({reason})") from error


def layers_in(shapes: Shapes) -> int:
    """Number of layers that have weights."""
    return len({name.removeprefix(_LAYERS).partition(".")[0] for name in shapes if name.startswith(_LAYERS)})


def check_layers(shapes: Shapes, layers: int, path: Path) -> None:
    """Compare the number of layers, which needs no model: one of ten million would take hours to make.

    Raises:
        ValueError: if it differs.
    """
    if (found := layers_in(shapes)) != layers:
        raise ValueError(
            f"{path}: hyper_parameters.num_hidden_layers: expected {found}, which have weights there, got {layers}"
        )


def check_shapes(found: Shapes, expected: Shapes, path: Path, strict: bool) -> None:
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
        wanted, got = (tuple(x[name]) if name in x else "none" for x in (expected, found))
        raise ValueError(
            f"{path}: state_dict.{name}: expected a weight of shape {wanted}, as hyper_parameters say, got {got}"
        )
