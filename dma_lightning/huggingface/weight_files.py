"""Weight files, safetensors or pickles: names and shapes are known before any model is built.

`torch.load` reads pickles (`pytorch_model.bin`) with `weights_only`, so they run no code.
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
    f"weights in {WEIGHTS}, in several files that {WEIGHTS}{_INDEX} names, in {PICKLE} with only tensors, or in "
    f"several files that {PICKLE}{_INDEX} names"
)


class _Index(msgspec.Struct):
    """An index: the file of each tensor. Only its file names are used; the files say which tensors they hold."""

    weight_map: dict[str, Annotated[str, msgspec.Meta(pattern=r"^[^/\\]+\.(safetensors|bin)$")]]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in an open file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor] = field(repr=False)
    """Returns the tensor; until the call, it may be only on disk."""


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Open the tensors in a folder, by name; if it has both formats, the safetensors.

    Raises:
        ValueError: if a file is missing or damaged, or could run code.
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
    return [WEIGHTS]  # the caller reports that it is missing


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
        is_zip = zipfile.is_zipfile(path)  # else of an old torch: no checksums, no mapping
        if is_zip:
            check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:  # torch's message advises a load that can run any code
        raise ValueError(f"{path}: expected {_EXPECTED}, got a file that could run any code or is damaged") from error
    except Exception as error:  # a damaged file can make torch raise anything
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"{path}: expected {_EXPECTED}, got a file that cannot be read ({reason})") from error
    tensors = content.items() if isinstance(content, dict) else [("", content)]
    for name, x in tensors:
        if not (isinstance(name, str) and isinstance(x, Tensor) and is_whole(x)):
            raise ValueError(f"{path}: expected {_EXPECTED}, got {name!r}: {type(x).__name__}")
    return {name: StoredTensor(tuple(x.shape), x.detach) for name, x in tensors}
