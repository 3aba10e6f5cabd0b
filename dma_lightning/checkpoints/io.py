"""Files of checkpoints: written whole or not at all, found again, and read without running code."""

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
    """Writes a checkpoint beside its place, to the disk, and moves it there: a path holds a whole checkpoint or none.

    (Lightning's own writes to the folder for temporary files, and copies from there if that is another file system.)
    Loading refuses whatever is no tensor, number, text or container of them, and saving does, too.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a URL as Lightning does.

        Raises:
            OSError: if it cannot be written; what was at `path` before is whole.
            ValueError: if it holds what could not be read again; what was at `path` before is whole.
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
        except RuntimeError as error:  # of torch's writer, on a full disk
            raise write_error(path, error) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: if asked to read arbitrary objects, which runs whatever code the file holds; for a folder; if it
                is damaged, or could run code.
        """
        if weights_only is not False and "://" in str(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            check_content(checkpoint)
            forget_paths(checkpoint)
            return checkpoint
        path = local_checkpoint(path, weights_only)
        if path.is_dir():
            raise ValueError(
                f"ckpt_path: expected a checkpoint of one file, got {path}, with a file of each process; FSDP2 reads "
                "it (-c trainer/fsdp), and writes one file without save_distributed_checkpoint"
            )
        return read_checkpoint(path, map_location, mmap=False)


def local_checkpoint(path: Any, weights_only: bool | None) -> Path:
    """Where a checkpoint is that somebody asks Lightning's interface for.

    Raises:
        ValueError: if it is not on this machine, or shall be read in a way that runs what it holds.
    """
    if weights_only is False:
        raise ValueError("weights_only: expected true, since other checkpoints can run any code; got false")
    if not isinstance(path, str | os.PathLike) or "://" in str(path):
        raise ValueError(f"checkpoint_path: expected a file of this machine, got {path!r}; download it first")
    return Path(path).expanduser()


def newest_checkpoint(folders: Iterable[Path]) -> Path | None:
    """Path of the checkpoint that `read_newest` finds, as a trainer takes it."""
    found = read_newest(folders)
    return None if found is None else found[0]


def read_newest(folders: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint written last of those at any depth below some folders that training can go on from.

    Those that cannot be read are left out with a warning.

    Returns:
        Its path and what `read_checkpoint` says that it holds; None if there is none.

    Raises:
        ValueError: if there are some, and none can be read.
    """
    damaged = []
    found = {file.resolve() for folder in folders for file in folder.rglob("*.ckpt") if file.exists()}
    for path in sorted(found, key=_time_written, reverse=True):
        try:
            saved = read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"ckpt_path last leaves out {error}")
            damaged.append(path)
            continue
        if "lr_schedulers" in saved:
            return path, saved
    if damaged:
        raise ValueError(
            f"ckpt_path last: expected a whole checkpoint, got {len(damaged)} that cannot be read, the newest "
            f"{damaged[0]}; bring back a copy, or move them away to begin anew"
        )
    return None


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """What a checkpoint holds; of a folder, without weights. Its checksums are compared once per process.

    Args:
        path: of the file or folder.
        map_location: where tensors go, as in `torch.load`.
        mmap: leave tensors on the disk until they are used.

    Raises:
        ValueError: if it is damaged, could run code, or a part has another type than it must have.
        PermissionError: if it may not be read.
    """
    verifies_content()  # raises if the switch is neither on nor off, which is no damage
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
    except pickle.UnpicklingError as error:  # torch advises to load what can run any code
        raise ValueError(f"{path}: expected a whole checkpoint of plain values, got {_not_plain(file)}") from error
    except Exception as error:  # torch raises whatever the damage leads to
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"{path}: expected a whole checkpoint, got one that cannot be read ({reason})") from error
    return checkpoint


def check_readable(file: Path) -> None:
    """Make sure that a checkpoint that was just written can be read again.

    Raises:
        ValueError: if it holds what is no tensor, number, text or container.
    """
    try:
        torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: expected tensors, numbers, text and containers alone, got {_not_plain(file)}; let callbacks "
            "and modules save plain values"
        ) from error


def _not_plain(file: Path) -> str:
    """What a checkpoint holds that must not be read."""
    try:
        found = ", ".join(map(repr, sorted(get_unsafe_globals_in_checkpoint(file))))
    except Exception:  # whatever the damage leads to
        found = ""
    return f"{found[:200]}, which could run any code" if found else "a structure that is damaged"


def _time_written(path: Path) -> int:
    return (path / META if (path / META).exists() else path).stat().st_mtime_ns
