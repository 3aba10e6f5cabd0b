"""Files of checkpoints: written whole or not at all, found again, and read without running code."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from dma_lightning.atomic_files import atomic_write, write_error
from dma_lightning.sharded_checkpoints import META, check_shards


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, to the disk, and moves it there: a path holds a whole checkpoint or none.

    (Lightning's own writes to the folder for temporary files, and copies from there if that is another file system.)
    Loading refuses whatever is no tensor, number, text or container of them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a URL as Lightning does.

        Raises:
            OSError: if it cannot be written; what was at `path` before is whole.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # of torch's writer, on a full disk
            raise write_error(path, error) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: if asked to read arbitrary objects, which runs whatever code the file holds; for a folder.
        """
        if weights_only is False:
            raise ValueError("weights_only: expected true, since other checkpoints can run any code; got false")
        if Path(path).is_dir():
            raise ValueError(
                f"ckpt_path: expected a checkpoint of one file, got {path}, with a file of each process; FSDP2 reads "
                "it (configs/trainer/fsdp.yaml), and writes one file without save_distributed_checkpoint"
            )
        return super().load_checkpoint(path, map_location, weights_only=True)


def newest_checkpoint(folders: Iterable[Path]) -> Path | None:
    """The checkpoint written last of those at any depth below some folders that training can go on from.

    Those that cannot be read are left out with a warning.

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
            return path
    if damaged:
        raise ValueError(
            f"ckpt_path last: expected a whole checkpoint, got {len(damaged)} that cannot be read, the newest "
            f"{damaged[0]}; bring back a copy, or move them away to begin anew"
        )
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, without reading the tensors from the disk; of a folder, without weights.

    Raises:
        ValueError: if it is damaged, or could run code.
    """
    try:
        if path.is_dir():
            check_shards(path)
        file = path / META if path.is_dir() else path
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises whatever the damage leads to, and advises to load what can run any code
        reason, *_ = f"{error}\n".splitlines()
        raise ValueError(f"{path}: expected a whole checkpoint, got one that cannot be read ({reason})") from error


def _time_written(path: Path) -> int:
    return (path / META if (path / META).exists() else path).stat().st_mtime_ns
