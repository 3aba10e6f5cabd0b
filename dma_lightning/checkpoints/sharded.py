"""Sharded checkpoints: folders with one part from each process, read without running code from them."""

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from dma_lightning.checkpoints.content_types import Count
from dma_lightning.files.atomic import sync_folder
from dma_lightning.files.reading import as_kind, check_regular
from dma_lightning.files.zip_checksums import check_records

_PLACE = tuple[str, Count, Count]  # where a folder stores a tensor: file name, offset and length in bytes
META = "meta.pt"  # the folder's file for all but weights and optimizer states; written last

# Types allowed in an index in addition to plain containers, numbers and text, by module.
_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # in Python 3.13
}


def load_sharded(path: Path, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Read this process's weights and moments from a folder that any number of processes wrote.

    Args:
        path: the folder.
        model: its weights are replaced.
        optimizers: the model's optimizers; their states are replaced.

    Raises:
        ValueError: if the index could run code, or a file is incomplete or damaged.
        torch.distributed.checkpoint.api.CheckpointException: if a value is not a tensor, number, text or container.
    """
    check_shards(path)
    weights = get_model_state_dict(model)
    _fill({"state_dict": weights}, path)
    model.load_state_dict(weights)
    for number, optimizer in enumerate(optimizers):
        state = {f"optimizer_{number}": get_optimizer_state_dict(model, optimizer)}
        _fill(state, path)
        (moments,) = state.values()
        set_optimizer_state_dict(model, optimizer, moments, options=StateDictOptions(cpu_offload=True))


def check_shards(path: Path) -> None:
    """Read a folder's indices as untrusted data, and compare its files with the sizes and checksums in them.

    Raises:
        ValueError: if there is no index, an index contains foreign types or names a file outside the folder, or a file
            is incomplete or damaged.
    """
    for index in _indices(path):
        content = _read_index(index)
        for key, place in content.storage_data.items():
            written: _PLACE = as_kind((place.relative_path, place.offset, place.length), _PLACE, f"{index}")
            name, offset, length = written
            file = path / name
            if Path(name).name != name or file.is_symlink():
                raise ValueError(f"{index}: expected the name of a file in this folder, got {name!r}")
            check_regular(file, "a part of a checkpoint")
            if (size := file.stat().st_size) < offset + length:
                raise ValueError(f"{file}: expected at least {offset + length} bytes, got {size}")
            try:
                check_records(file, offset, length)
                if isinstance(content.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
                    _check_plain(file, offset, length)  # other strategies read these without this check
            except ValueError as error:
                raise ValueError(f"{file}, byte {offset}: {error}") from error


def _check_plain(file: Path, offset: int, length: int) -> None:
    """Check a stored value that is not a tensor.

    Raises:
        ValueError: if it is not plain.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        part = io.BytesIO(stream.read(length))
    try:
        torch.load(part, weights_only=True)
    except Exception as error:  # a damaged file can make torch raise anything, and advise an unsafe load
        raise ValueError("expected a plain value, got one that could run any code or is damaged") from error


def sharded_weights(path: Path) -> dict[str, TensorStorageMetadata]:
    """Index entries of the weights in a folder, by name."""
    entries = [entry for index in _indices(path) for entry in _read_index(index).state_dict_metadata.items()]
    return {
        name.removeprefix("state_dict."): entry
        for name, entry in entries
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }


def _indices(path: Path) -> list[Path]:
    indices = list(path.glob("*.metadata"))
    if not indices:
        raise ValueError(f"{path}: expected an index of the files in it, got none")
    return indices


def replace_folder(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`; whatever `path` named before, a folder, file or link, stays until then."""
    with (new / META).open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(new)
    before = path.with_stem(f"{path.stem}-before")
    if path.exists() or path.is_symlink():
        remove(before)
        path.rename(before)  # still a checkpoint
    new.rename(path)
    sync_folder(path.parent)
    remove(before)


def remove(path: Path) -> None:
    """Delete a folder, file or link if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _fill(state: dict[str, Any], path: Path) -> None:
    """Replace all values of a state with a folder's."""
    load(state, storage_reader=FileSystemReader(path), planner=_PlainPlanner())


class _PlainPlanner(DefaultLoadPlanner):
    """Torch's planner, but values that are not tensors must be plain."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)  # raises before the planner's unsafe load
        except pickle.UnpicklingError:  # torch's message advises a load that can run any code
            name = read_item.storage_index.fqn
            raise ValueError(f"{name}: expected a plain value, got one that could run any code") from None
        value.seek(0)
        super().load_bytes(read_item, value)


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles only the types that an index contains."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _read_index(file: Path) -> Metadata:
    """Read an index as untrusted data.

    Raises:
        ValueError: if it is damaged or contains foreign types.
    """
    check_regular(file, "the index of a sharded checkpoint")
    with file.open("rb") as stream:
        try:
            index = _IndexUnpickler(stream).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file}: expected the index of a sharded checkpoint, got {error}, which could run any code; use "
                "checkpoints only from sources you trust"
            ) from error
        except Exception as error:  # a damaged file can make pickle raise anything
            raise ValueError(
                f"{file}: expected the index of a sharded checkpoint, got a damaged one ({error})"
            ) from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{file}: expected the index of a sharded checkpoint, got {type(index).__name__}")
    return index
