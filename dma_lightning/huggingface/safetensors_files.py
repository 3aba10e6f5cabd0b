"""Weights in safetensors files, of which the headers are read first: names and shapes, before anything is built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dma_lightning.files.reading import check_regular, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_EXPECTED = f"weights in {WEIGHTS}, or in several files that {INDEX} names (other formats are not read)"


class _Index(msgspec.Struct):
    """What names the files of weights, by tensor; the files themselves say which tensors they hold."""

    weight_map: dict[str, Annotated[str, msgspec.Meta(pattern=r"^[^/\\]+\.safetensors$")]]


def open_weights(folder: Path) -> dict[str, Any]:
    """The open file that holds each tensor, by the tensor's name.

    Raises:
        ValueError: if files are missing or damaged.
    """
    names = [WEIGHTS]
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        names = sorted(set(read_json(folder / INDEX, _Index, _EXPECTED).weight_map.values()))
    files = [_opened(folder / name) for name in names]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118  # no mapping


def _opened(path: Path) -> Any:
    check_regular(path, _EXPECTED)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected {_EXPECTED}: {error}") from error


def shapes(files: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of tensors by name, of what `open_weights` returns."""
    return {name: file.get_slice(name).get_shape() for name, file in files.items()}


def tensors(files: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, of what `open_weights` returns."""
    return {name: file.get_tensor(name) for name, file in files.items()}
