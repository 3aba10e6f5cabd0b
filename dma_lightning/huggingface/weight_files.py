"""Files of weights, of which names and shapes are read first, before anything is built: safetensors, or pickles.

A pickle (`pytorch_model.bin`) is read by `torch.load` with `weights_only`, so it runs no code.
"""

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dma_lightning.checkpoints.content_types import is_whole
from dma_lightning.files.reading import check_regular, read_json
from dma_lightning.files.zip_checksums import check_records

WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_INDEX = ".index.json"

_EXPECTED = (
    f"weights in {WEIGHTS}, or in several files that {WEIGHTS}{_INDEX} names, or tensors alone in {PICKLE}, or in "
    f"several files that {PICKLE}{_INDEX} names"
)


class _Index(msgspec.Struct):
    """What names the files of weights, by tensor; the files themselves say which tensors they hold."""

    weight_map: dict[str, Annotated[str, msgspec.Meta(pattern=r"^[^/\\]+\.(safetensors|bin)$")]]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a file that is open."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor] = field(repr=False)
    """Gives the tensor; until then it may be on the disk alone."""


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by their names; safetensors, if there are both.

    Raises:
        ValueError: if files are missing or damaged, or could run code.
    """
    found: dict[str, StoredTensor] = {}
    for name in _files(folder):
        path = folder / name
        check_regular(path, _EXPECTED)
        found |= _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
    return found


def _files(folder: Path) -> list[str]:
    for whole in (WEIGHTS, PICKLE):
        index = folder / f"{whole}{_INDEX}"
        if (folder / whole).exists():
            return [whole]
        if index.exists():
            return sorted(set(read_json(index, _Index, _EXPECTED).weight_map.values()))
    return [WEIGHTS]  # whose absence is told


def _of_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file: Any = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected {_EXPECTED}: {error}") from error
    return {
        name: StoredTensor(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
        for name in file.keys()  # noqa: SIM118  # no mapping
    }


def _of_pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        is_zip = zipfile.is_zipfile(path)  # else of an old torch, which has neither checksums nor parts to map
        if is_zip:
            check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:  # torch advises to load what can run any code
        raise ValueError(f"{path}: expected {_EXPECTED}, got what could run any code, or is damaged") from error
    except Exception as error:  # torch raises whatever the damage leads to
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"{path}: expected {_EXPECTED}, got a file that cannot be read ({reason})") from error
    tensors = content.items() if isinstance(content, dict) else [("", content)]
    for name, x in tensors:
        if not (isinstance(name, str) and isinstance(x, Tensor) and is_whole(x)):
            raise ValueError(f"{path}: expected {_EXPECTED}, got {name!r}: {type(x).__name__}")
    return {name: StoredTensor(tuple(x.shape), x.detach) for name, x in tensors}
