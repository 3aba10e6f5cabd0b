"""Documents in files of text or JSONL, also compressed, read as streams."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dma_lightning.data.text import byte_pieces

_CHUNK = 1 << 20
_JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Piece:
    """Part of a document, small enough to be tokenised at once.

    Attributes:
        text: of it.
        bytes: of the text in UTF-8.
        read: bytes of the file that were read so far, before decompression.
        next_line: where a document ends, the number of lines up to there, or none for the rest of the file; -1 within.
    """

    text: str
    bytes: int
    read: int
    next_line: int | None


def read_documents(path: Path, text_field: str, skip_lines: int = 0) -> Iterator[Piece]:
    """The documents of a file: of JSONL (`.jsonl`, `.ndjson`) one per line, else the whole; `.gz` and `.zst` too.

    Empty documents are left out.

    Args:
        path: of the file.
        text_field: which field of a JSONL line is the text.
        skip_lines: lines of JSONL to leave out.

    Raises:
        ValueError: if the file is damaged, no UTF-8, or a line is no JSON object with such a field.
    """
    with path.open("rb") as raw:
        try:
            stream = _decompress(path, raw)
            suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
            if suffix in _JSONL:
                yield from _lines(path, stream, raw, text_field, skip_lines)
            else:
                yield from _whole(path, stream, raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: expected a whole {path.suffix} file: {error}") from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # of a library that need not be there
                raise
            raise ValueError(f"{path}: expected a whole {path.suffix} file: {error}") from error


def _decompress(path: Path, raw: BinaryIO) -> BinaryIO:
    """What is in the file.

    Raises:
        ValueError: if the library for it is missing.
    """
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix != ".zst":
        return raw
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path}: expected the library zstandard for .zst files; pip install zstandard") from error
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), _CHUNK)


def _whole(path: Path, stream: BinaryIO, raw: BinaryIO) -> Iterator[Piece]:
    """The file as one document."""
    line, last = 1, None
    for piece in byte_pieces(iter(lambda: stream.read(_CHUNK), b"")):
        text = _decode(path, line, piece)
        line += piece.count(b"\n")
        if last is not None:
            yield last
        last = Piece(text, len(piece), raw.tell(), -1)
    if last is not None:
        yield Piece(last.text, last.bytes, last.read, None)


def _lines(path: Path, stream: BinaryIO, raw: BinaryIO, text_field: str, skip_lines: int) -> Iterator[Piece]:
    """Each line as one document."""
    for number, line in enumerate(stream, start=1):
        if number <= skip_lines or not line.strip():
            continue
        text = _text(path, number, line, text_field)
        pieces = list(byte_pieces(text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)))
        for left, piece in enumerate(pieces, start=1 - len(pieces)):
            yield Piece(piece.decode(), len(piece), raw.tell(), -1 if left else number)


def _text(path: Path, number: int, line: bytes, text_field: str) -> bytes:
    """The text in a line of JSONL, in UTF-8."""
    try:
        record = json.loads(_decode(path, number, line))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: expected a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}")
    if not isinstance(text := record.get(text_field), str):
        raise ValueError(
            f"{path}, line {number}: expected a string in the field {text_field!r}, got the fields "
            f"{ ({name: type(value).__name__ for name, value in record.items()}) }; name another by --text_field"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, line {number}: expected text, got half of a character: {error}") from error


def _decode(path: Path, line: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: expected UTF-8: {error.reason} {data[error.start]:#x}") from error
