"""The JSON files of a prepared folder, and the rules that they must meet together."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from tqdm import tqdm

from dma_lightning.data.arrays import LengthType, ends_size, largest_token, mapped
from dma_lightning.files.reading import Count, read_json, sha256
from dma_lightning.tokenizers import SpecialTokens

TokenType = Literal["uint8", "uint16", "uint32"]

VERSION = 2  # version 1 does not store the bytes of each token
PLAN, MANIFEST, TOKENIZER = "plan.json", "manifest.json", "tokenizer.json"
_THREADS = 8  # to check shards; disks serve no more at once

Positive = Annotated[int, msgspec.Meta(ge=1)]
SHA256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ShardRecord:
    """What is known about a finished shard.

    Attributes:
        name: name of its files, without an ending.
        tokens: number of tokens.
        documents: number of documents.
        bytes: size of their text in UTF-8.
        tokens_sha256: hash of the file of tokens.
        ends_sha256: hash of the file of ends.
        next_file: number of the input file where the next shard begins.
        next_line: number of lines, rows or separated documents of that file that are done.
        lengths_dtype: dtype of the file with each token's size in bytes; none if tokens are bytes, or in version 1.
        lengths_sha256: hash of that file.
    """

    name: str
    tokens: Positive
    documents: Positive
    bytes: Count
    tokens_sha256: SHA256
    ends_sha256: SHA256
    next_file: Count
    next_line: Count
    lengths_dtype: LengthType | None = None
    lengths_sha256: SHA256 | None = None

    def __post_init__(self) -> None:
        if (self.lengths_dtype is None) != (self.lengths_sha256 is None):
            raise ValueError("lengths_dtype and lengths_sha256: expected both or neither")

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of its files, by file name."""
        hashes = {f"{self.name}.tokens": self.tokens_sha256, f"{self.name}.ends.npy": self.ends_sha256}
        return hashes | ({} if self.lengths_sha256 is None else {f"{self.name}.lengths": self.lengths_sha256})

    def sizes(self, dtype: str) -> dict[str, int]:
        """Sizes of its files in bytes, by file name; `dtype` is the dtype of tokens."""
        numbers = {"tokens": dtype} | ({} if self.lengths_dtype is None else {"lengths": self.lengths_dtype})
        sizes = {f"{self.name}.{ending}": self.tokens * np.dtype(x).itemsize for ending, x in numbers.items()}
        return sizes | {f"{self.name}.ends.npy": ends_size(self.documents)}

    def verify(self, folder: Path) -> None:
        """Read its files and compare their hashes.

        Raises:
            ValueError: if one is missing or differs from what was written.
        """
        for file, digest in self.hashes.items():
            if not (folder / file).is_file() or sha256(folder / file) != digest:
                raise ValueError(
                    f"{folder / file}: expected what was written, got other content; the disk may be failing. Delete "
                    f"{self.name}.json and {MANIFEST} there and prepare again, which rebuilds this shard and all later"
                )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the content of a prepared folder, down to the byte.

    Attributes:
        version: version of the format.
        tokenizer_sha256: hash of `tokenizer.json`; none if tokens are bytes.
        vocab_size: number of different tokens.
        dtype: dtype of tokens, the smallest that holds them.
        text_field: which field of a JSONL line, or which column, is the text.
        eos_token_id: token at the end of each document, if there is one.
        shard_tokens: a shard ends with the document that reaches this many tokens.
        files: text files and saved datasets, each with its size and its modification time in ns.
        special_tokens: whether text that spells a special token became that token or stayed text.
        separator: what stood between the documents of a plain text file; none if each file was one document.
    """

    version: int
    tokenizer_sha256: SHA256 | None
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    dtype: TokenType
    text_field: str
    eos_token_id: Count | None
    shard_tokens: Positive
    files: list[tuple[str, Count, int]]
    special_tokens: SpecialTokens = "parse"
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.dtype != (smallest := token_type(self.vocab_size)):
            raise ValueError(f"dtype: expected {smallest} for {self.vocab_size} tokens, got {self.dtype}")
        if self.tokenizer_sha256 is None and self.vocab_size != 256:
            raise ValueError(f"vocab_size: expected 256 for tokens that are bytes, got {self.vocab_size}")
        if self.eos_token_id is not None and self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id: expected one of {self.vocab_size} tokens, got {self.eos_token_id}")

    def __getitem__(self, name: str) -> Any:
        """A field, for scripts that read the JSON file as a dictionary."""
        return getattr(self, name)


@dataclass(frozen=True, kw_only=True)
class Manifest(Plan):
    """Everything about a finished folder.

    Attributes:
        tokens: number of tokens in all shards.
        documents: number of documents in all shards.
        bytes: size of their text in UTF-8.
        shards: the records of the shards, in order.
    """

    tokens: Positive
    documents: Positive
    bytes: Count
    shards: list[ShardRecord]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "documents", "bytes"):
            if (total := sum(getattr(shard, name) for shard in self.shards)) != getattr(self, name):
                raise ValueError(f"{name}: expected the sum of the shards, {total}, got {getattr(self, name)}")
        if self.tokenizer_sha256 is None:
            text_bytes = self.tokens - (0 if self.eos_token_id is None else self.documents)
            if self.bytes != text_bytes:
                raise ValueError(f"bytes: expected {text_bytes}, one for each token but end tokens, got {self.bytes}")
        for number, shard in enumerate(self.shards):
            if shard.name != shard_name(number):
                raise ValueError(f"shards[{number}].name: expected {shard_name(number)}, got {shard.name!r}")
            if (shard.lengths_dtype is None) == self.has_lengths:
                raise ValueError(f"shards[{number}].lengths_dtype: expected one if tokens are not bytes, and only then")

    @property
    def has_lengths(self) -> bool:
        """Whether the folder stores the bytes of each token."""
        return self.version > 1 and self.tokenizer_sha256 is not None

    @property
    def knows_bytes(self) -> bool:
        """Whether the bytes of each token are known."""
        return self.version > 1 or self.tokenizer_sha256 is None

    def verify(self, folder: Path) -> None:
        """Read all shards and check them.

        Raises:
            ValueError: if one differs from what was written, or its numbers are impossible.
        """
        pool = ThreadPoolExecutor(min(_THREADS, cpu_count() or 1))
        checks = pool.map(lambda shard: self._verify_shard(folder, shard), self.shards)
        try:
            list(tqdm(checks, f"check {folder}", len(self.shards), unit="shard", delay=5))
        finally:
            pool.shutdown(cancel_futures=True)

    def _verify_shard(self, folder: Path, shard: ShardRecord) -> None:
        shard.verify(folder)
        if shard.lengths_dtype is not None:
            file = folder / f"{shard.name}.lengths"
            if (total := int(mapped(str(file), shard.lengths_dtype).sum(dtype=np.uint64))) > shard.bytes:
                raise ValueError(
                    f"{file}: expected tokens of at most the {shard.bytes} bytes of the text, got {total}; prepare the "
                    "text again"
                )
        file = folder / f"{shard.name}.tokens"
        if (largest := largest_token(file, self.dtype)) >= self.vocab_size:
            raise ValueError(
                f"{file}: expected tokens below {self.vocab_size}, got {largest}; prepare the text again with its "
                "tokenizer"
            )


class _Versioned(msgspec.Struct):
    version: int


def token_type(vocab_size: int) -> TokenType:
    """The smallest dtype that holds every token."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(number: int) -> str:
    """The name of a shard's files, without an ending."""
    return f"shard-{number:05d}"


def read_records(folder: Path) -> list[ShardRecord]:
    """The records of the finished shards, from the first on.

    Raises:
        ValueError: if a record is damaged.
    """
    records: list[ShardRecord] = []
    while (path := folder / f"{shard_name(len(records))}.json").exists():
        record = read_json(path, ShardRecord, "the counts and hashes of a shard")
        if record.name != path.stem:
            raise ValueError(f"{path}: name: expected {path.stem}, got {record.name!r}; delete the file")
        records.append(record)
    return records


def read_plan(folder: Path) -> Plan:
    """The plan that a folder was begun with.

    Raises:
        ValueError: if it is damaged or of another version.
    """
    path, what = folder / PLAN, "what `dma-lightning prepare` was asked for"
    version = read_json(path, _Versioned, what).version
    if version != VERSION:
        raise ValueError(
            f"{path}: expected version {VERSION}, got {version}; delete the folder or name another one, and prepare "
            "the text from the beginning"
        )
    return read_json(path, Plan, what)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        ValueError: if there is none, if it is damaged or of another version, or if a shard's file has the wrong size.
    """
    path, what = folder / MANIFEST, "a manifest of `dma-lightning prepare`"
    if not path.exists():
        unfinished = "; it is not finished: run the same `dma-lightning prepare` again" * (folder / PLAN).exists()
        raise ValueError(f"{folder}: expected a folder made by `dma-lightning prepare`, got no {MANIFEST}{unfinished}")
    version = read_json(path, _Versioned, what).version
    if not 1 <= version <= VERSION:
        raise ValueError(f"{path}: expected version 1 or {VERSION}, got {version}; prepare the text again")
    manifest = read_json(path, Manifest, what)
    for shard in manifest.shards:
        for name, size in shard.sizes(manifest.dtype).items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise ValueError(
                    f"{folder / name}: expected a file of {size} bytes, got {found}; copy the folder again, or delete "
                    "its manifest.json and prepare again"
                )
    return manifest
