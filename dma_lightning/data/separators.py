"""Several documents in one plain text, with a separator between them."""

from collections.abc import Iterable, Iterator
from itertools import chain


def separator_bytes(separator: str | None) -> bytes | None:
    """A separator in UTF-8.

    Raises:
        ValueError: if it is empty or not UTF-8.
    """
    if separator == "":
        raise ValueError("separator: expected at least one character, got none; without one, each file is a document")
    try:
        return None if separator is None else separator.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"separator: expected UTF-8, as the text, got {separator!r}") from error


def separated(chunks: Iterable[bytes], separator: bytes) -> Iterator[Iterator[bytes]]:
    """The documents of a text, without the separators: like `bytes.split` on the whole text, but as streams.

    Args:
        chunks: the text in pieces of any size.
        separator: at least one byte; it may span several chunks.

    Yields:
        Pieces of each document; read all of them before you ask for the next document.
    """
    parts = _parts(chunks, separator)
    for first, ends in parts:
        yield chain([first], () if ends else _up_to_end(parts))


def _parts(chunks: Iterable[bytes], separator: bytes) -> Iterator[tuple[bytes, bool]]:
    """Parts of documents, and whether each is the last of its document."""
    held, most = b"", len(separator) - 1  # a separator may begin in the last bytes of a chunk
    for chunk in chunks:
        *whole, rest = (held + chunk).split(separator)
        yield from ((part, True) for part in whole)
        border = max(0, len(rest) - most)
        yield rest[:border], False
        held = rest[border:]
    yield held, True


def _up_to_end(parts: Iterator[tuple[bytes, bool]]) -> Iterator[bytes]:
    """Parts up to the last one of a document."""
    for part, ends in parts:
        yield part
        if ends:
            return
