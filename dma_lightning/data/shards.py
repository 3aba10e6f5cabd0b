"""Tokens on disk: shards of whole documents, and a manifest that is written last.

- `shard-00000.tokens`: the tokens of its documents, one document after the other;
- `shard-00000.ends.npy`: int64 `[documents]`, where each document ends in that file;
- `shard-00000.lengths`: how many bytes of text each token stands for, unless tokens are bytes;
- `shard-00000.json`: counts and hashes of these files, and where in the input the shard ends;
- `tokenizer.json`, unless tokens are bytes;
- `plan.json`: the arguments of `prepare`;
- `manifest.json`: everything about the finished folder.
"""

import contextlib
import hashlib
import json
import os
from array import array
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dma_lightning.data.arrays import LengthType, LengthWriter, mapped, mapped_ends
from dma_lightning.data.manifests import ShardRecord, read_manifest, shard_name  # noqa: F401  # its former place
from dma_lightning.files.atomic import atomic_write
from dma_lightning.files.reading import sha256


class ShardWriter:
    """Writes one shard; its files get their names only when they are complete.

    Args:
        folder: folder to write to.
        number: number of the shard.
        dtype: dtype of tokens.
        with_lengths: also write how many bytes of text each token stands for.
    """

    def __init__(self, folder: Path, number: int, dtype: np.dtype, with_lengths: bool = False) -> None:
        self.folder, self.name, self.dtype = folder, shard_name(number), dtype
        self.ends, self.tokens, self.bytes = array("q"), 0, 0
        self.digest = hashlib.sha256()
        self.path = folder / f"{self.name}.tokens"
        self.file = _unfinished(self.path).open("wb")
        self.lengths_path = folder / f"{self.name}.lengths"
        self.lengths = LengthWriter(_unfinished(self.lengths_path).open("w+b")) if with_lengths else None

    def add(self, tokens: np.ndarray, size: int, lengths: np.ndarray | None = None) -> None:
        """Append the tokens of `size` bytes of text; shards with lengths need `lengths`, as `LengthWriter.add` does."""
        self._write(tokens)
        self.bytes += size
        if self.lengths:
            assert lengths is not None
            self.lengths.add(lengths, size)

    def end_document(self, eos: np.ndarray) -> None:
        """End a document here, with a token that stands for no text or with none; skip it if it has no tokens."""
        has_tokens = self.tokens > (self.ends[-1] if self.ends else 0)
        eos = eos if has_tokens else eos[:0]
        self._write(eos)
        if self.lengths:
            self.lengths.end_document(len(eos))
        if has_tokens:
            self.ends.append(self.tokens)

    def finish(self, next_file: int, next_line: int) -> ShardRecord:
        """Give the files their names, and write the record."""
        lengths: tuple[LengthType, str] | tuple[None, None] = None, None
        if self.lengths:
            _name(self.lengths.file, self.lengths_path)
            lengths = self.lengths.dtype_name, sha256(self.lengths_path)
        _name(self.file, self.path)
        ends = self.folder / f"{self.name}.ends.npy"
        with atomic_write(ends) as file:
            np.save(file, np.frombuffer(self.ends, dtype=np.int64))
        counts, hashes = (self.tokens, len(self.ends), self.bytes), (self.digest.hexdigest(), sha256(ends))
        record = ShardRecord(self.name, *counts, *hashes, next_file, next_line, *lengths)
        write_json(self.folder / f"{self.name}.json", asdict(record))
        return record

    def discard(self) -> None:
        """Delete all files of the unfinished shard."""
        for file in (self.file, self.lengths.file) if self.lengths else (self.file,):
            with contextlib.suppress(OSError):  # the disk may be full when the rest is flushed
                file.close()
        for path in (self.path, self.lengths_path):
            _unfinished(path).unlink(missing_ok=True)

    def _write(self, tokens: np.ndarray) -> None:
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B") if len(tokens) else b""
        self.digest.update(data)
        self.file.write(data)
        self.tokens += len(tokens)


@dataclass(frozen=True)
class Shard:
    """Part of a shard's tokens, mapped on first use in each process.

    Args:
        tokens_file: the shard's file of tokens.
        ends_file: the shard's file of ends; None if documents are not kept apart.
        dtype: dtype of tokens.
        start: first token of the part.
        stop: token after the last one of the part.
        lengths_file: how many bytes of text each token of the whole shard stands for; None if tokens are bytes, or if
            the lengths are unknown.
        lengths_dtype: dtype of that file.
        byte_tokens: each token is a byte of text.
        eos: the last token of each document is an end token and stands for no text.
    """

    tokens_file: str
    ends_file: str | None
    dtype: str
    start: int
    stop: int
    lengths_file: str | None = None
    lengths_dtype: str | None = None
    byte_tokens: bool = False
    eos: bool = False

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of the part."""
        return mapped(self.tokens_file, self.dtype)[self.start : self.stop]

    @cached_property
    def ends(self) -> np.ndarray:
        """Where the documents of the whole shard end, counted from its first token."""
        assert self.ends_file is not None
        tokens = Path(self.tokens_file).stat().st_size // np.dtype(self.dtype).itemsize
        return mapped_ends(Path(self.ends_file), tokens)

    def bytes_of(self, start: int, stop: int, without: np.ndarray) -> int | None:
        """How many bytes of text a range of tokens stands for; None if that is unknown.

        Args:
            start: first token, counted from the start of the part.
            stop: token after the last one.
            without: tokens that are not counted, as offsets from `start`.
        """
        start, stop = start + self.start, stop + self.start
        if self.lengths_file is not None:
            lengths = self._lengths[start:stop]
            return int(lengths.sum()) - (int(lengths[without].sum()) if len(without) else 0)
        if not self.byte_tokens:
            return None
        if not self.eos:
            return stop - start - len(without)
        is_text = np.ones(stop - start, np.bool_)
        first, last = np.searchsorted(self.ends, (start, stop), side="right")
        is_text[self.ends[first:last] - 1 - start] = False
        is_text[without] = False
        return int(np.count_nonzero(is_text))

    @cached_property
    def _lengths(self) -> np.ndarray:
        assert self.lengths_file is not None
        assert self.lengths_dtype is not None
        return mapped(self.lengths_file, self.lengths_dtype)

    def __reduce__(self) -> tuple:
        """Send another process the places of the tokens, not the tokens."""
        return Shard, tuple(getattr(self, field.name) for field in fields(self))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file; it appears whole or not at all."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _name(file: BinaryIO, path: Path) -> None:
    """Give a finished file its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    _unfinished(path).replace(path)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
