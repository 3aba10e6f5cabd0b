"""Documents in files of text or JSONL, compressed or not, or in rows, read as streams."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dma_lightning.data.find_files import COMPRESSED, JSONL, PARQUET, is_saved_dataset
from dma_lightning.data.row_formats import Row, dataset_rows, parquet_rows
from dma_lightning.data.separators import separated, separator_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer  # in collections.abc from Python 3.12 on

_CHUNK = 1 << 20
_PIECE = 4 << 20  # bytes that a tokenizer takes at once, unless a line ends earlier
_PACKED = 1 << 16  # compressed bytes that are read at once
_BOM = b"\xef\xbb\xbf"
_NO_TEXT = (".json", ".tar", ".tgz")  # would otherwise pass for text

_Stream = BinaryIO | gzip.GzipFile


@dataclass(frozen=True)
class Piece:
    """Part of a document, small enough to tokenize at once.

    Attributes:
        text: text of the piece.
        bytes: size of the text in UTF-8.
        read: number of bytes of the file read so far, before decompression.
        next_line: at the end of a document, the number of lines, rows or separated documents up to there, or None if
            the document is the whole file; -1 within a document.
    """

    text: str
    bytes: int
    read: int
    next_line: int | None


def read_documents(path: Path, text_field: str, skip_lines: int = 0, separator: str | None = None) -> Iterator[Piece]:
    """The documents of a file.

    Each line of JSONL (`.jsonl`, `.ndjson`) is one, and each row of `.parquet` or of a saved dataset. Any other file is
    one, or several with a separator between them. Text and JSONL may be `.gz` and `.zst`. Empty documents and a byte
    order mark are left out.

    Args:
        path: path of the file, or of the folder of a saved dataset.
        text_field: which field of a JSONL line, or which column, is the text.
        skip_lines: number of JSONL lines, of rows or of separated documents to skip.
        separator: what stands between the documents of a plain text. Default: each file is one document.

    Raises:
        ValueError: if the file is damaged, not UTF-8, an archive or `.json`, if a line is not a JSON object with
            such a field, if there is no such column, or if a library for the format is missing.
    """
    if is_saved_dataset(path):
        yield from _rows(dataset_rows(path, text_field, skip_lines))
        return
    suffix = _kind(path)
    if suffix == PARQUET:
        yield from _rows(parquet_rows(path, text_field, skip_lines))
        return
    with _opened(path) as (stream, raw):
        if suffix in JSONL:
            yield from _lines(path, stream, raw, text_field, skip_lines)
        else:
            yield from _plain(path, stream, raw, separator_bytes(separator), skip_lines)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON object in each line of a JSONL file, which may be compressed, and the number of the line from 1 on.

    Empty lines and a byte order mark are left out.

    Raises:
        ValueError: if the file is damaged, or not UTF-8, if its name says that it is not JSONL, or if a line is not a
            JSON object.
    """
    if _kind(path) not in JSONL:
        raise ValueError(f"{path}: expected JSONL ({', '.join(JSONL)}), got another file; exclude it with a glob")
    with _opened(path) as (stream, _):
        for number, line in _numbered(stream):
            yield number, _record(path, number, line)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Stream, BinaryIO]]:
    """The decompressed content of a file, and the file itself.

    Raises:
        ValueError: if it is damaged, or the library for it is missing.
    """
    compression = path.suffix.lower()
    with path.open("rb") as raw:
        try:
            yield _decompress(path, compression, raw), raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: expected a whole {compression} file: {error}") from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # the optional library may be missing, so compare the name
                raise
            raise ValueError(f"{path}: expected a whole {compression} file: {error}") from error


def check_separator(separator: str | None, files: Iterable[Path]) -> None:
    """Check that a separator, if there is one, has something to separate.

    Raises:
        ValueError: if it is empty or not UTF-8, or if no file is plain text.
    """
    if separator_bytes(separator) is not None and not any(_is_plain(file) for file in files):
        raise ValueError(
            "separator: expected a plain text file, got only lines and rows, each of which is a document; leave the "
            "separator out"
        )


def check_plain(path: Path) -> None:
    """Refuse a file whose name says that it is not plain text.

    Raises:
        ValueError: if it is JSONL, compressed, an archive or `.json`, or has rows.
    """
    if not _is_plain(path) or path.suffix.lower() in COMPRESSED:
        raise ValueError(
            f"path: expected plain text, got {path}; `dma-lightning prepare` reads such files, for PreparedDataModule"
        )


def _is_plain(path: Path) -> bool:
    """Whether a file is plain text, perhaps compressed."""
    return not is_saved_dataset(path) and _kind(path) not in (*JSONL, PARQUET)


def plain_chunks(path: Path) -> Iterator[bytes]:
    """A file of plain text, read in pieces as `read_documents` does, but with any bytes."""
    with path.open("rb") as stream:
        yield from _chunks(stream)


def _chunks(stream: _Stream) -> Iterator[bytes]:
    """The content of a file, without a byte order mark."""
    if first := stream.read(_CHUNK).removeprefix(_BOM):
        yield first
    while chunk := stream.read(_CHUNK):
        yield chunk


def _kind(path: Path) -> str:
    """The ending of a name, in lower case, without the ending of a compression.

    Raises:
        ValueError: if it is the ending of an archive, or `.json`, or of what cannot be compressed as a whole.
    """
    compressed = path.suffix.lower() in COMPRESSED
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    if suffix == ".arrow":
        raise ValueError(f"{path}: expected text, got .arrow; name the folder that `Dataset.save_to_disk` wrote")
    if suffix == PARQUET and compressed:
        raise ValueError(f"{path}: expected .parquet, which is compressed in itself, got {path.suffix}; unpack it")
    if suffix in _NO_TEXT:
        raise ValueError(
            f"{path}: expected text or JSONL, got {suffix}; unpack it, name it .jsonl if each of its lines is a "
            "document, or exclude it with a glob"
        )
    return suffix


def _decompress(path: Path, compression: str, raw: BinaryIO) -> _Stream:
    """The decompressed content of the file.

    Raises:
        ValueError: if the library for it is missing.
    """
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression != ".zst":
        return raw
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path}: expected the library zstandard for .zst files; pip install zstandard") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return io.BufferedReader(_Joined(_frames(raw, decompressor.decompressobj)), _CHUNK)


def _frames(raw: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """The content of Zstandard frames, in pieces; the library's own stream accepts a truncated frame as a whole one."""
    frame = None
    while packed := raw.read(_PACKED):
        while packed:
            frame = frame or new_frame()
            yield frame.decompress(packed)
            packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends within a frame")


class _Joined(io.RawIOBase):
    """A stream of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        target = memoryview(buffer)
        while not self.rest and (piece := next(self.pieces, None)) is not None:
            self.rest = memoryview(piece)
        size = min(len(target), len(self.rest))
        target[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _plain(path: Path, stream: _Stream, raw: BinaryIO, separator: bytes | None, skip: int) -> Iterator[Piece]:
    """The file as one document, or as those that a separator stands between."""
    line, chunks = 1, _chunks(stream)
    documents = [chunks] if separator is None else separated(chunks, separator)
    for number, document in enumerate(documents, start=1):
        last = None
        for piece in byte_pieces(document):
            text = _decode(path, line, piece)
            line += piece.count(b"\n")
            if last is not None:
                yield last
            last = Piece(text, len(piece), raw.tell(), -1) if number > skip else None
        if last is not None:
            yield replace(last, next_line=None if separator is None else number)
        line += separator.count(b"\n") if separator else 0


def _lines(path: Path, stream: _Stream, raw: BinaryIO, text_field: str, skip_lines: int) -> Iterator[Piece]:
    """Each line as one document."""
    for number, line in _numbered(stream):
        if number <= skip_lines:
            continue
        yield from _document(_text(path, number, line, text_field), raw.tell(), number)


def _rows(rows: Iterable[Row]) -> Iterator[Piece]:
    """Each row as one document."""
    for row in rows:
        yield from _document(row.text, row.read, row.number)


def _document(text: bytes, read: int, number: int) -> Iterator[Piece]:
    """The pieces of a document that is a line or a row."""
    pieces = list(byte_pieces(text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)))
    for left, piece in enumerate(pieces, start=1 - len(pieces)):
        yield Piece(piece.decode(), len(piece), read, -1 if left else number)


def _numbered(stream: _Stream) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, and their numbers, without a byte order mark."""
    for number, line in enumerate(stream, start=1):
        line = line if number > 1 else line.removeprefix(_BOM)
        if line.strip():
            yield number, line


def byte_pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Text in pieces of whole lines, or of whole words if lines are long.

    A tokenizer sees one piece at a time, so tokens at the border of two pieces may differ from those of the whole text.
    """
    rest: list[bytes] = []
    size = 0
    for chunk in chunks:
        rest.append(chunk)
        size += len(chunk)
        if b"\n" not in chunk and size < _PIECE:
            continue
        text = b"".join(rest)
        end = text.rfind(b"\n") + 1 or max(0, text.rfind(b" ")) or _character_end(text)
        if end:
            yield text[:end]
        rest, size = [text[end:]], len(text) - end
    if size:
        yield b"".join(rest)


def _character_end(text: bytes) -> int:
    """Where the last character begins; a cut there splits no character."""
    end = len(text) - 1
    while end > 0 and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _text(path: Path, number: int, line: bytes, text_field: str) -> bytes:
    """The text in a line of JSONL, in UTF-8."""
    record = _record(path, number, line)
    if not isinstance(text := record.get(text_field), str):
        raise ValueError(
            f"{path}, line {number}: expected a string in the field {text_field!r}, got the fields "
            f"{ ({name: type(value).__name__ for name, value in record.items()}) }; name another with --text_field"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, line {number}: expected text, got half of a character: {error}") from error


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The JSON object in a line."""
    decoded = _decode(path, number, line)
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # ValueError also for a number with too many digits
        raise ValueError(f"{path}, line {number}: expected a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}")
    return record


def _decode(path: Path, line: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: expected UTF-8: {error.reason} {data[error.start]:#x}") from error
