"""Checkpoint files: written whole or not at all, found again, and read without running code."""

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch.serialization import get_unsafe_globals_in_checkpoint

from dma_lightning.checkpoints.content_types import check_content, forget_paths
from dma_lightning.checkpoints.sharded import META, check_shards
from dma_lightning.files.atomic import atomic_write, write_error
from dma_lightning.files.reading import check_regular, verifies_content
from dma_lightning.files.zip_checksums import check_records


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to disk under a temporary name, then renames it: a path holds a whole checkpoint or none.

    (Lightning's own plugin writes to the system's temporary folder, and copies from there if that is on another file
    system.) Loading and saving both refuse everything but tensors, numbers, text and containers of these.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; to a URL, as Lightning does.

        Raises:
            OSError: if the checkpoint cannot be written; an earlier file at `path` stays intact.
            ValueError: if it contains values that loading would refuse; an earlier file at `path` stays intact.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
                file.flush()
                check_readable(Path(file.name))
        except RuntimeError as error:  # from torch's writer, on a full disk
            raise write_error(path, error) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: if `weights_only` is False, which would run any code in the file; if `path` is a folder; if the
                checkpoint is damaged or could run code.
        """
        if weights_only is not False and "://" in str(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            check_content(checkpoint)
            forget_paths(checkpoint)
            return checkpoint
        path = local_checkpoint(path, weights_only)
        if path.is_dir():
            raise ValueError(
                f"ckpt_path: expected a checkpoint of one file, got {path}, with a file of each process; read it with "
                "FSDP2 (-c trainer/fsdp), which writes one file if save_distributed_checkpoint is false"
            )
        return read_checkpoint(path, map_location, mmap=False)


def local_checkpoint(path: Any, weights_only: bool | None) -> Path:
    """Convert the arguments of Lightning's loading functions to a local path.

    Raises:
        ValueError: if the path is not on this machine, or `weights_only` is False, which could run code.
    """
    if weights_only is False:
        raise ValueError("weights_only: expected true, since false lets a checkpoint run any code; got false")
    if not isinstance(path, str | os.PathLike) or "://" in str(path):
        raise ValueError(f"checkpoint_path: expected a file on this machine, got {path!r}; download it first")
    return Path(path).expanduser()


def newest_checkpoint(folders: Iterable[Path]) -> Path | None:
    """Path of the checkpoint that `read_newest` finds; None if there is none."""
    found = read_newest(folders)
    return None if found is None else found[0]


def read_newest(folders: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest checkpoint, at any depth below some folders, that training can resume from.

    Unreadable checkpoints are skipped with a warning.

    Returns:
        Its path and its content, as from `read_checkpoint`; None if there is none.

    Raises:
        ValueError: if none can be resumed from, and at least one cannot be read.
    """
    damaged = []
    found = {file.resolve() for folder in folders for file in folder.rglob("*.ckpt") if file.exists()}
    for path in sorted(found, key=_time_written, reverse=True):
        try:
            saved = read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"ckpt_path last skips {error}")
            damaged.append(path)
            continue
        if "lr_schedulers" in saved:
            return path, saved
    if damaged:
        raise ValueError(
            f"ckpt_path last: expected a whole checkpoint, got {len(damaged)} that cannot be read, the newest "
            f"{damaged[0]}; restore a copy, or move them away to start over"
        )
    return None


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint's content; a folder's without its weights. Checksums are checked once per process.

    Args:
        path: path of the file or folder.
        map_location: where tensors go, as in `torch.load`.
        mmap: leave tensors on disk until they are used.

    Raises:
        ValueError: if the checkpoint is damaged or could run code, or a part has the wrong type.
        PermissionError: if you may not read it.
    """
    verifies_content()  # here, so that a bad value of its variable is not reported as damage
    file = path / META if path.is_dir() else path
    check_regular(file, "a checkpoint")
    try:
        if path.is_dir():
            check_shards(path)
        check_records(file)
        checkpoint = torch.load(file, weights_only=True, map_location=map_location, mmap=mmap)
        check_content(checkpoint)
        forget_paths(checkpoint)
    except PermissionError as error:
        raise PermissionError(f"{path}: expected a checkpoint that you may read, got {error}; ask its owner") from error
    except pickle.UnpicklingError as error:  # torch's message advises a load that can run any code
        raise ValueError(f"{path}: expected a whole checkpoint of plain values, got {_not_plain(file)}") from error
    except Exception as error:  # a damaged file can make torch raise anything
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"{path}: expected a whole checkpoint, got one that cannot be read ({reason})") from error
    return checkpoint


def check_readable(file: Path) -> None:
    """Check that a newly written checkpoint can be read again.

    Raises:
        ValueError: if it contains anything but tensors, numbers, text and containers.
    """
    try:
        torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: expected only tensors, numbers, text and containers, got {_not_plain(file)}; let callbacks "
            "and modules save plain values"
        ) from error


def _not_plain(file: Path) -> str:
    """Describe the content of a checkpoint that must not be read."""
    try:
        found = ", ".join(map(repr, sorted(get_unsafe_globals_in_checkpoint(file))))
    except Exception:  # a damaged file can raise anything
        found = ""
    return f"{found[:200]}, which could run any code" if found else "a damaged structure"


def _time_written(path: Path) -> int:
    return (path / META if (path / META).exists() else path).stat().st_mtime_ns
