"""The tokens of a text in a cache folder: an array, its lengths, and a record that is written last.

- `NAME.bin`: the tokens;
- `NAME.lengths`: how many bytes of text each token stands for, unless tokens are bytes;
- `NAME.json`: counts and hashes of these files.
"""

import secrets
import warnings
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from dma_lightning.data.arrays import LengthType, LengthWriter, largest_token
from dma_lightning.data.manifests import SHA256, Count
from dma_lightning.files.atomic import atomic_write
from dma_lightning.files.reading import check_regular, read_json, sha256, verifies_content

_VERSION = 1
_PRIVATE, _PUBLIC = 0o600, 0o666  # the umask applies to the second


@dataclass(frozen=True)
class CacheRecord:
    """What is known about an array.

    Attributes:
        version: version of the format.
        tokens: number of tokens.
        bytes: size of the text.
        largest: the largest token id; -1 if there are no tokens.
        sha256: hash of the array.
        lengths_dtype: dtype of the file of lengths, if there is one.
        lengths_sha256: hash of the file of lengths, if there is one.
    """

    version: Annotated[int, msgspec.Meta(ge=_VERSION, le=_VERSION)]
    tokens: Count
    bytes: Count
    largest: Annotated[int, msgspec.Meta(ge=-1)]
    sha256: SHA256
    lengths_dtype: LengthType | None
    lengths_sha256: SHA256 | None


@dataclass(frozen=True)
class TextCache:
    """The files of one text with one tokenizer. Several processes may write them at the same time.

    Args:
        array: file of the tokens.
        vocab_size: number of different tokens.
        with_lengths: whether there is a file of lengths.
    """

    array: Path
    vocab_size: int
    with_lengths: bool

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds every token."""
        return np.min_scalar_type(self.vocab_size - 1)

    @property
    def lengths(self) -> Path:
        """The file of each token's length in bytes of text."""
        return self.array.with_suffix(".lengths")

    @property
    def record(self) -> Path:
        """The file of counts and hashes."""
        return self.array.with_suffix(".json")

    @property
    def files(self) -> list[Path]:
        """All files, in the order in which they are written."""
        return [self.array, *([self.lengths] if self.with_lengths else []), self.record]

    def is_whole(self) -> bool:
        """Whether the files are there and valid; if only some are, or one is damaged, a warning says why.

        Raises:
            ValueError: if one of them is a link.
        """
        if not any(file.exists() or file.is_symlink() for file in self.files):
            return False
        try:
            record = self.read()
            if verifies_content():
                self._verify(record)
        except _NotWholeError as error:
            warnings.warn(f"{error}; the text is read again, and the file is rewritten", stacklevel=2)
            return False
        return True

    def read(self) -> CacheRecord:
        """The record of the array, after quick checks.

        Raises:
            ValueError: if a file is missing or a link, or cannot be what was written.
        """
        for file in self.files:
            if file.is_symlink():
                raise ValueError(f"{file}: expected a file of this cache, got a link; remove it")
        try:
            for file in self.files:
                check_regular(file, "a file of the text cache")
            record = read_json(self.record, CacheRecord, "a record of the text cache")
        except PermissionError as error:
            raise ValueError(
                f"{self.record}: expected a text cache that you may read, got another user's; name another with "
                "data.cache_dir"
            ) from error
        except ValueError as error:
            raise _NotWholeError(str(error)) from error
        self._check_sizes(record)
        return record

    def write(
        self, pieces: Iterable[tuple[np.ndarray, np.ndarray | None, int]], text_bytes: int, private: bool
    ) -> None:
        """Write all files.

        Args:
            pieces: pieces of the text, each as its tokens, their lengths as for `LengthWriter.add`, and its size in
                bytes.
            text_bytes: size of the text in bytes.
            private: whether only this user may read the files.
        """
        suffix, mode = f".{secrets.token_hex(8)}.tmp", _PRIVATE if private else _PUBLIC
        with (
            atomic_write(self.array, suffix, mode) as array,
            atomic_write(self.lengths, suffix, mode) if self.with_lengths else nullcontext() as lengths,
        ):
            writer = None if lengths is None else LengthWriter(lengths)
            for tokens, lengths_of_tokens, size in pieces:
                array.write(tokens.astype(self.dtype).data)
                if writer:
                    assert lengths_of_tokens is not None
                    writer.add(lengths_of_tokens, size)
        record = CacheRecord(
            _VERSION,
            self.array.stat().st_size // self.dtype.itemsize,
            text_bytes,
            largest_token(self.array, self.dtype.name),
            sha256(self.array),
            writer.dtype_name if writer else None,
            sha256(self.lengths) if writer else None,
        )
        with atomic_write(self.record, suffix, mode) as file:
            file.write(msgspec.json.encode(asdict(record)))

    def make_private(self) -> None:
        """Keep other users from reading the files, since the text has become private."""
        for file in self.files:
            if file.stat().st_mode & 0o077:
                with suppress(OSError):  # another user's files, who may have published the text, or a read-only disk
                    file.chmod(_PRIVATE)

    def _check_sizes(self, record: CacheRecord) -> None:
        sizes = {self.array: record.tokens * self.dtype.itemsize}
        if self.with_lengths:
            if record.lengths_dtype is None:
                raise _NotWholeError(f"{self.record}: expected lengths_dtype, got none")
            sizes[self.lengths] = record.tokens * np.dtype(record.lengths_dtype).itemsize
        for file, size in sizes.items():
            if (found := file.stat().st_size) != size:
                raise _NotWholeError(f"{file}: expected {size} bytes, got {found}")
        if record.largest >= self.vocab_size:
            raise _NotWholeError(f"{self.record}: largest: expected a token below {self.vocab_size}, got another")

    def _verify(self, record: CacheRecord) -> None:
        hashes = {self.array: record.sha256} | ({self.lengths: record.lengths_sha256} if self.with_lengths else {})
        for file, digest in hashes.items():
            if sha256(file) != digest:
                raise _NotWholeError(f"{file}: expected what was written, got other content")
        if (largest := largest_token(self.array, self.dtype.name)) != record.largest:
            raise _NotWholeError(f"{self.array}: expected {record.largest} as the largest token, got {largest}")


class _NotWholeError(ValueError):
    """A file of the cache is missing or damaged."""
