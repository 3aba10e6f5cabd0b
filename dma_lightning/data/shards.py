"""Tokens on disk: shards of whole documents, and a manifest that is written last.

- `shard-00000.tokens`: the tokens of its documents, one after the other;
- `shard-00000.ends.npy`: int64 `[documents]`, where each document ends among them;
- `shard-00000.json`: counts and hashes of both, and where in the input it ends;
- `tokenizer.json`, unless tokens are bytes;
- `plan.json`: what was asked for;
- `manifest.json`: everything about the finished whole.
"""

import contextlib
import hashlib
import io
import json
import os
from array import array
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dma_lightning.atomic_files import atomic_write

VERSION = 1
PLAN, MANIFEST, TOKENIZER = "plan.json", "manifest.json", "tokenizer.json"


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard.

    Attributes:
        name: of its files.
        tokens: how many.
        documents: how many.
        bytes: of their text in UTF-8.
        tokens_sha256: hash of the file of tokens.
        ends_sha256: hash of the file of ends.
        next_file: number of the input file where the next shard begins.
        next_line: lines of it that are done.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    tokens_sha256: str
    ends_sha256: str
    next_file: int
    next_line: int

    def verify(self, folder: Path) -> None:
        """Read both files again.

        Raises:
            ValueError: if one is missing or is not what was written.
        """
        for file, sha256 in ((self.name + ".tokens", self.tokens_sha256), (self.name + ".ends.npy", self.ends_sha256)):
            if not (folder / file).exists() or _sha256(folder / file) != sha256:
                raise ValueError(
                    f"{folder / file}: expected what was written, got other content; the disk may fail. Delete "
                    f"{self.name}.json and {MANIFEST} there and prepare again, to make the shards from it on anew"
                )


class ShardWriter:
    """Writes one shard; its files have their names only when they are whole.

    Args:
        folder: where to.
        number: of the shard.
        dtype: of tokens.
    """

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self.folder, self.name, self.dtype = folder, f"shard-{number:05d}", dtype
        self.ends, self.tokens, self.bytes = array("q"), 0, 0
        self.digest = hashlib.sha256()
        self.path = folder / f"{self.name}.tokens"
        self.file = _unfinished(self.path).open("wb")

    def add(self, tokens: np.ndarray, size: int) -> None:
        """Append tokens of so many bytes of text."""
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B") if len(tokens) else b""
        self.digest.update(data)
        self.file.write(data)
        self.tokens += len(tokens)
        self.bytes += size

    def end_document(self) -> None:
        """Let a document end here, if it has tokens."""
        if self.tokens > (self.ends[-1] if self.ends else 0):
            self.ends.append(self.tokens)

    def finish(self, next_file: int, next_line: int) -> ShardRecord:
        """Give the files their names."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        _unfinished(self.path).replace(self.path)
        ends = self.folder / f"{self.name}.ends.npy"
        with atomic_write(ends) as file:
            np.save(file, np.frombuffer(self.ends, dtype=np.int64))
        hashes = self.digest.hexdigest(), _sha256(ends)
        record = ShardRecord(self.name, self.tokens, len(self.ends), self.bytes, *hashes, next_file, next_line)
        write_json(self.folder / f"{self.name}.json", asdict(record))
        return record

    def discard(self) -> None:
        """Leave nothing."""
        with contextlib.suppress(OSError):  # of a full disk, for what was not written yet
            self.file.close()
        _unfinished(self.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Shard:
    """Part of a shard's tokens, mapped when they are first read, in each process.

    Args:
        tokens_file: of it.
        ends_file: of it; None if documents are not told apart.
        dtype: of tokens.
        start: first token of the part.
        stop: token behind the part.
    """

    tokens_file: str
    ends_file: str | None
    dtype: str
    start: int
    stop: int

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of the part."""
        return _mapped(self.tokens_file, self.dtype)[self.start : self.stop]

    @cached_property
    def ends(self) -> np.ndarray:
        """Where the documents of the whole shard end, counted from its first token."""
        with Path(self.ends_file).open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return _mapped(self.ends_file, "int64", file.tell())

    def __reduce__(self) -> tuple:
        """To another process goes where the tokens are, not what they are."""
        return Shard, (self.tokens_file, self.ends_file, self.dtype, self.start, self.stop)


def read_records(folder: Path) -> list[ShardRecord]:
    """The finished shards from the first on."""
    records: list[ShardRecord] = []
    while (path := folder / f"shard-{len(records):05d}.json").exists():
        records.append(ShardRecord(**read_json(path)))
    return records


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: if there is none, it is of another version, or a file of a shard has not its size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = "; it is not finished: run the same `dma-lightning prepare` again" * (folder / PLAN).exists()
        raise ValueError(f"{folder}: expected a folder made by `dma-lightning prepare`, got no {MANIFEST}{unfinished}")
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {manifest.get('version')}; prepare the text again")
    for shard in manifest["shards"]:
        sizes = {
            f"{shard['name']}.tokens": shard["tokens"] * np.dtype(manifest["dtype"]).itemsize,
            f"{shard['name']}.ends.npy": _ends_size(shard["documents"]),
        }
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else None
            if found != size:
                raise ValueError(
                    f"{folder / name}: expected a file of {size} bytes, got {found}; copy the folder again, or delete "
                    "its manifest.json and prepare again"
                )
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file says.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a JSON file of `dma-lightning prepare`: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON file of `dma-lightning prepare`, got {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _ends_size(documents: int) -> int:
    """Bytes of the file of so many ends."""
    header, dtype = io.BytesIO(), np.dtype("int64")
    description = {"shape": (documents,), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.tell() + documents * dtype.itemsize


def _mapped(file: str, dtype: str, start: int = 0) -> np.ndarray:
    """A file from a byte on as an array, without a file descriptor: thousands of shards are mapped at once."""
    content = torch.from_file(file, size=Path(file).stat().st_size, dtype=torch.uint8).numpy()
    content.setflags(write=False)
    return content[start:].view(dtype)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
