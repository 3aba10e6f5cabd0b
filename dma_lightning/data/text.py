"""Text as bytes, packed to sequences of one length."""

import glob
import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dma_lightning.data.base import SequenceDataModule

_CHUNK = 1 << 20
_SEPARATOR = b"\n"


class ByteWindows(Dataset):
    """Consecutive windows of a byte array; the label of a byte is the byte after it.

    Args:
        data: uint8 `[bytes]`, may be memory-mapped.
        sequence_length: N, the length of a window.
    """

    def __init__(self, data: np.ndarray, sequence_length: int) -> None:
        self.data, self.sequence_length = data, sequence_length

    def __len__(self) -> int:
        return max(0, len(self.data) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.sequence_length
        window = torch.from_numpy(self.data[start : start + self.sequence_length + 1].astype(np.int64))
        return {"input_ids": window[:-1], "labels": window[1:]}


class TextDataModule(SequenceDataModule):
    """Language modelling on text files, byte by byte.

    The text is written once into a memory-mapped array in a cache folder, under a name made from its content. Its
    first part is for training and its last for validation; `test` and `predict` use the validation part as well.

    Args:
        path: a file, a folder (all files below it that are not hidden) or a glob. Default: the English help topics
            that every Python carries (`pydoc_data.topics`).
        sequence_length: bytes in a sequence.
        val_fraction: share of the text, at its end, that is kept for validation.
        batch_size: sequences in a batch of each process.
        num_workers: processes that load data beside each training process.
        cache_dir: where the array is kept. Default: `dma-lightning` in the user's cache folder.

    Raises:
        ValueError: in `prepare_data` or `setup`, if the path holds no text or the text is too short.
    """

    def __init__(
        self,
        path: str | None = None,
        sequence_length: int = 256,
        val_fraction: float = 0.1,
        batch_size: int = 16,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(256, sequence_length, 1.0, batch_size, num_workers)
        self.save_hyperparameters()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        self.path, self.val_fraction = path, val_fraction
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else _user_cache() / "dma-lightning"

    def prepare_data(self) -> None:
        """Write the array, unless it is there. Called on one process per node."""
        if not self._cache_file.exists():
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            unfinished = self._cache_file.with_suffix(f".{os.getpid()}.tmp")
            with unfinished.open("wb") as file:
                file.writelines(self._chunks())
            unfinished.replace(self._cache_file)

    def setup(self, stage: str) -> None:
        """Map the array and split it."""
        data = np.memmap(self._cache_file, dtype=np.uint8, mode="r")
        train_size = len(data) - round(len(data) * self.val_fraction)
        self.train_set = ByteWindows(data[:train_size], self.sequence_length)
        self.val_set = self.test_set = ByteWindows(data[train_size:], self.sequence_length)
        if not (len(self.train_set) and len(self.val_set)):
            raise ValueError(
                f"text of {len(data)} bytes: the training and validation parts ({train_size} and "
                f"{len(data) - train_size} bytes) must each exceed sequence_length = {self.sequence_length}; "
                "give more text, shorten sequence_length or change val_fraction"
            )

    @cached_property
    def _cache_file(self) -> Path:
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return self.cache_dir / f"bytes-{digest.hexdigest()[:32]}.bin"

    def _chunks(self) -> Iterator[bytes]:
        """The whole text, piece by piece."""
        if self.path is None:
            from pydoc_data.topics import topics  # half a megabyte that other corpora do not need

            for topic in topics.values():
                yield topic.encode() + _SEPARATOR
            return
        files = text_files(self.path)
        if not any(file.stat().st_size for file in files):
            raise ValueError(f"path: expected text, got only empty files at {self.path!r}")
        for file in files:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
            yield _SEPARATOR


def text_files(path: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted; folders are searched to the bottom.

    Raises:
        ValueError: if there is none.
    """
    root = Path(path).expanduser()
    found = [root] if root.exists() else [Path(match) for match in glob.glob(str(root), recursive=True)]
    files: set[Path] = set()
    for match in found:
        below = match.rglob("*") if match.is_dir() else [match]
        files.update(
            file
            for file in below
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(match).parts)
        )
    if not files:
        raise ValueError(f"path: expected a text file, a folder with files or a glob that matches, got {path!r}")
    return sorted(files)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
