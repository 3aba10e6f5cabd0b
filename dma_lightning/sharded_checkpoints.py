"""Checkpoints of which every process has written its part to a folder: reading them runs no code that they hold."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from dma_lightning.checkpoints import read_checkpoint

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


def load_sharded(path: Path, model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Read the weights and moments of this process out of a folder that any number of processes has written.

    Args:
        path: the folder.
        model: whose weights are replaced.
        optimizers: of it, whose states are replaced.

    Returns:
        All else that the checkpoint holds.

    Raises:
        ValueError: if its index could run code.
        torch.distributed.checkpoint.api.CheckpointException: if another value is no tensor, number, text or container.
    """
    for index in path.glob("*.metadata"):
        _check_index(index)
    weights = get_model_state_dict(model)
    _fill({"state_dict": weights}, path)
    model.load_state_dict(weights)
    for number, optimizer in enumerate(optimizers):
        state = {f"optimizer_{number}": get_optimizer_state_dict(model, optimizer)}
        _fill(state, path)
        (moments,) = state.values()
        set_optimizer_state_dict(model, optimizer, moments, options=StateDictOptions(cpu_offload=True))
    return read_checkpoint(path)


def _fill(state: dict[str, Any], path: Path) -> None:
    """Replace all values of a state by those of a folder."""
    load(state, storage_reader=FileSystemReader(path), planner=_PlainPlanner())


class _PlainPlanner(DefaultLoadPlanner):
    """Torch's planner, for which what is no tensor must be a plain value."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises before the planner reads it with less care
        value.seek(0)
        super().load_bytes(read_item, value)


class _IndexUnpickler(pickle.Unpickler):
    """Knows what an index is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check_index(file: Path) -> None:
    """Read an index as if it were harmful.

    Raises:
        ValueError: if it holds anything that an index does not.
    """
    with file.open("rb") as stream:
        try:
            _IndexUnpickler(stream).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file}: expected the index of a sharded checkpoint, got {error}, which could run any code; take "
                "checkpoints from where you trust"
            ) from error
