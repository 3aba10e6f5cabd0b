"""Arrays on disk: tokens, the bytes of each, and the ends of documents. They are mapped, never read as a whole."""

import io
import os
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch

_CHUNK = 1 << 20

LengthType = Literal["uint8", "uint32"]


class LengthWriter:
    """Writes how many bytes of text each token stands for: in uint8, or all in uint32 once a token is longer.

    Text that a tokenizer drops counts for the next token of the document.

    Args:
        file: file to write to and read from.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.dtype_name: LengthType = "uint8"
        self.dropped = 0  # bytes of the document after its last token

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the file."""
        return np.dtype(self.dtype_name)

    def add(self, lengths: np.ndarray, size: int) -> None:
        """Append the lengths of the tokens of a piece of a document.

        Args:
            lengths: bytes from the end of the previous token, or from the start of the piece, to the token's end.
            size: bytes of the piece.

        Raises:
            ValueError: if a token stands for 4 GiB or more.
        """
        left = size - int(lengths.sum())
        if self.dropped and len(lengths):
            lengths = lengths.astype(np.int64)
            lengths[0] += self.dropped
            self.dropped = 0
        self._write(lengths)
        self.dropped += left

    def end_document(self, tokens: int) -> None:
        """End the document with this many tokens that stand for no text."""
        self.dropped = 0
        self._write(np.zeros(tokens, np.uint8))

    def _write(self, lengths: np.ndarray) -> None:
        largest = 0 if lengths.dtype == np.uint8 else lengths.max(initial=0)
        if largest >= 1 << 32:
            raise ValueError(
                f"expected tokens of less than 4 GiB of text, got one of {largest} bytes, most of which the tokenizer "
                "drops; use another tokenizer"
            )
        if largest > 255 and self.dtype == np.uint8:
            self._widen()
        self.file.write(lengths.astype(self.dtype).data)

    def _widen(self) -> None:
        """Rewrite everything as uint32, from the end backward, so that no byte is overwritten before it is read."""
        self.dtype_name, count = "uint32", self.file.tell()
        for start in reversed(range(0, count, _CHUNK)):
            self.file.seek(start)
            chunk = np.frombuffer(self.file.read(min(_CHUNK, count - start)), np.uint8)
            self.file.seek(start * self.dtype.itemsize)
            self.file.write(chunk.astype(self.dtype).data)
        self.file.seek(0, os.SEEK_END)


def mapped(file: str, dtype: str, start: int = 0) -> np.ndarray:
    """A file from byte `start` on, as an array. It holds no descriptor, so thousands of files can be mapped at once."""
    size = Path(file).stat().st_size
    if not size:
        return np.empty(0, dtype)
    content = torch.from_file(file, size=size, dtype=torch.uint8).numpy()
    content.setflags(write=False)
    return content[start:].view(dtype)


def largest_token(file: Path, dtype: str) -> int:
    """The largest id in a file of tokens; -1 if there is none."""
    tokens = mapped(str(file), dtype)
    return int(tokens.max()) if len(tokens) else -1


def mapped_ends(file: Path, tokens: int) -> np.ndarray:
    """Where documents end, int64 `[documents]`.

    Args:
        file: the file of ends.
        tokens: number of tokens in the shard.

    Raises:
        ValueError: if the file is damaged; ends must rise up to the number of tokens.
    """
    documents = (file.stat().st_size - len(_ends_header(0))) // 8
    header = _ends_header(max(0, documents))  # not NumPy's own reader, which runs Python's parser on the file's header
    with file.open("rb") as stream:
        found = stream.read(len(header))
    if found == header and file.stat().st_size == ends_size(documents):
        ends = mapped(str(file), "int64", len(header))
        if documents and ends[0] > 0 and ends[-1] == tokens and (ends[1:] > ends[:-1]).all():
            return ends
    raise ValueError(
        f"{file}: expected ends of documents that rise up to the {tokens} tokens of the shard, got others; copy the "
        "folder again, or prepare the text again"
    )


def ends_size(documents: int) -> int:
    """Size in bytes of a file with the ends of this many documents."""
    return len(_ends_header(documents)) + 8 * documents


def _ends_header(documents: int) -> bytes:
    """The header that precedes the ends in their file."""
    header = io.BytesIO()
    description = {"shape": (documents,), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(np.dtype("i8"))}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()
