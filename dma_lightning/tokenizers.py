"""Text to tokens and back."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream


class Tokenizer(Protocol):
    """Text to tokens and back."""

    vocab_size: int
    """Number of different tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """One piece of text for each token, empty as long as a character is not whole; at last what is left over."""


class ByteTokenizer:
    """The bytes of UTF-8 as tokens; what is no UTF-8 decodes to U+FFFD."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """One token per byte."""
        return list(text.encode())

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Characters as soon as their last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(bytes([token]))
        yield decoder.decode(b"", final=True)


class FileTokenizer:
    """A `tokenizer.json` of the library `tokenizers`. Special tokens are neither added nor shown.

    Args:
        path: the file.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        try:
            self._load(Path(path).read_text())
        except Exception as error:  # the library raises no other
            raise ValueError(f"{path}: expected a tokenizer.json of the library tokenizers: {error}") from error

    @classmethod
    def of_json(cls, text: str) -> "FileTokenizer":
        """The tokenizer of what a file says."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(text)
        return tokenizer

    def _load(self, text: str) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(text)
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=0)

    def to_json(self) -> str:
        """What the file says."""
        return self.tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces as soon as they are whole characters."""
        stream = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            yield stream.step(self.tokenizer, token) or ""
