"""Checkpoints of which every process has written its part to a folder: reading them runs no code that they hold."""

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

_PLACE = tuple[str, Count, Count]  # of a tensor in a folder: name of the file, offset and length in bytes
META = "meta.pt"  # a file of such a folder, with all but weights and optimizer states; written last

# What an index may be made of besides plain containers, numbers and text, by module.
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
    """Read the weights and moments of this process out of a folder that any number of processes has written.

    Args:
        path: the folder.
        model: whose weights are replaced.
        optimizers: of it, whose states are replaced.

    Raises:
        ValueError: if its index could run code, or files are not whole.
        torch.distributed.checkpoint.api.CheckpointException: if another value is no tensor, number, text or container.
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
    """Read the indices of a folder as if they were harmful, and compare sizes and checksums of its files with them.

    Raises:
        ValueError: if there is none, one holds anything that an index does not or names a file outside the folder, or
            a file is not whole.
    """
    for index in _indices(path):
        content = _read_index(index)
        for key, place in content.storage_data.items():
            written: _PLACE = as_kind((place.relative_path, place.offset, place.length), _PLACE, f"{index}")
            name, offset, length = written
            file = path / name
            if Path(name).name != name or file.is_symlink():
                raise ValueError(f"{index}: expected names of files in this folder, got {name!r}")
            check_regular(file, "a part of a checkpoint")
            if (size := file.stat().st_size) < offset + length:
                raise ValueError(f"{file}: expected at least {offset + length} bytes, got {size}")
            try:
                check_records(file, offset, length)
                if isinstance(content.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
                    _check_plain(file, offset, length)  # strategies of others read these with less care
            except ValueError as error:
                raise ValueError(f"{file}, byte {offset}: {error}") from error


def _check_plain(file: Path, offset: int, length: int) -> None:
    """Read a value that is no tensor.

    Raises:
        ValueError: if it is not plain.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        part = io.BytesIO(stream.read(length))
    try:
        torch.load(part, weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to, and advises to read with less care
        raise ValueError("expected a plain value, got one that could run any code, or is damaged") from error


def sharded_weights(path: Path) -> dict[str, TensorStorageMetadata]:
    """What the index of a folder says about the weights there."""
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
    """Give a folder its name; what had it before, a folder, a file or a link, stands until then."""
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
    """Delete a folder, a file or a link, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _fill(state: dict[str, Any], path: Path) -> None:
    """Replace all values of a state by those of a folder."""
    load(state, storage_reader=FileSystemReader(path), planner=_PlainPlanner())


class _PlainPlanner(DefaultLoadPlanner):
    """Torch's planner, for which what is no tensor must be a plain value."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)  # raises before the planner reads it with less care
        except pickle.UnpicklingError:  # whose text advises to load what can run any code
            name = read_item.storage_index.fqn
            raise ValueError(f"{name}: expected a plain value, got one that could run any code") from None
        value.seek(0)
        super().load_bytes(read_item, value)


class _IndexUnpickler(pickle.Unpickler):
    """Knows what an index is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _read_index(file: Path) -> Metadata:
    """An index, read as if it were harmful.

    Raises:
        ValueError: if it is damaged or holds anything that an index does not.
    """
    check_regular(file, "the index of a sharded checkpoint")
    with file.open("rb") as stream:
        try:
            index = _IndexUnpickler(stream).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file}: expected the index of a sharded checkpoint, got {error}, which could run any code; take "
                "checkpoints from where you trust"
            ) from error
        except Exception as error:  # pickle raises whatever the damage leads to
            raise ValueError(
                f"{file}: expected the index of a sharded checkpoint, got a damaged one ({error})"
            ) from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{file}: expected the index of a sharded checkpoint, got {type(index).__name__}")
    return index
