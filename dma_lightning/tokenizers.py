"""Text to tokens and back."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

_NO_UTF8 = 0xFF  # a byte that stands in no UTF-8
_CONTEXT = 8  # tokens before the new ones that are decoded with them
_RECENT = _CONTEXT + 3  # so that it can begin with a character, of four bytes at most
_LONGEST = 64  # tokens after which what is no whole character is shown as it is


class Tokenizer(Protocol):
    """Text to tokens and back."""

    vocab_size: int
    """Number of different tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The text of tokens that stand after others: a piece for each token, at last what is left over.

        A piece is empty as long as its last character is not whole.
        """


class ByteTokenizer:
    """The bytes of UTF-8 as tokens; what is no UTF-8, or no byte, decodes to U+FFFD."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """One token per byte."""
        return list(text.encode())

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Characters as soon as their last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(bytes([token if token < self.vocab_size else _NO_UTF8]))
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
            self._load(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # the library raises no other
            raise ValueError(f"{path}: expected a tokenizer.json of the library tokenizers: {error}") from error

    @classmethod
    def of_json(cls, text: str) -> "FileTokenizer":
        """The tokenizer of what a file says."""
        tokenizer = cls.__new__(cls)
        try:
            tokenizer._load(text)
        except Exception as error:  # the library raises no other
            raise ValueError(f"expected what a tokenizer.json says, got something else: {error}") from error
        return tokenizer

    def _load(self, text: str) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(text)
        self.tokenizer.no_truncation()  # a file may ask for both, which would cut the text
        self.tokenizer.no_padding()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=0)

    def to_json(self) -> str:
        """What the file says."""
        return self.tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no other
            raise ValueError(f"the tokenizer cannot encode {text[:40]!r}...: {error}") from error

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Pieces as soon as they are whole characters, with the space that a token has only behind another."""
        # Decoded anew from the token before the last piece on: a token's text depends on the one before it.
        recent, new = list(after)[-_RECENT:], []
        context = self._whole_characters(recent)
        for token in tokens:
            new.append(token)
            text = self._text_behind(context, new)
            if text.endswith("\ufffd") and len(new) < _LONGEST:
                yield ""
                continue
            yield text
            recent, new = (recent + new)[-_RECENT:], []
            context = self._whole_characters(recent)
        yield self._text_behind(context, new)

    def _whole_characters(self, tokens: list[int]) -> list[int]:
        """The last tokens, from where a character begins: of bytes that begin within one, all text may be spoilt."""
        last = (tokens[-count:] for count in range(_CONTEXT, _RECENT + 1))
        return next((x for x in last if not self.tokenizer.decode(x).startswith("\ufffd")), tokens[-_CONTEXT:])

    def _text_behind(self, context: list[int], new: list[int]) -> str:
        """What tokens add to the text of others."""
        return self.tokenizer.decode(context + new)[len(self.tokenizer.decode(context)) :]
