"""Text to tokens and back."""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Protocol, get_args

import msgspec
import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from dma_lightning.files.reading import check_regular

SpecialTokens = Literal["text", "parse"]

_FILE = "a tokenizer.json of the library tokenizers"
_ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is not UTF-8
_NO_UTF8 = 0xFF  # a byte that never occurs in UTF-8
_CONTEXT = 8  # tokens before the new ones that are decoded with them
_RECENT = _CONTEXT + 3  # so that the context can begin with a whole character, of four bytes at most
_LONGEST = 64  # tokens after which an incomplete character is shown as it is


# The library allocates memory for every id up to the largest, and ends the process if there is not enough.
_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]


class _AddedToken(msgspec.Struct):
    id: _TokenId


class _Model(msgspec.Struct):
    vocab: dict[str, _TokenId] | list = msgspec.field(default_factory=list)  # a list for Unigram: ids are its indices


class _Content(msgspec.Struct):
    """The parts of a file that are checked before the library reads it."""

    model: _Model
    added_tokens: list[_AddedToken] = msgspec.field(default_factory=list)


class Tokenizer(Protocol):
    """Text to tokens and back."""

    vocab_size: int
    """Number of different tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The text of tokens that follow others: one piece per token, then the rest.

        A piece is empty as long as its last character is incomplete.
        """


class ByteTokenizer:
    """The bytes of UTF-8 as tokens; invalid UTF-8, or a token that is not a byte, decodes to U+FFFD."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """One token per byte."""
        return list(text.encode())

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of a text, the character where each begins, and how many bytes it stands for: one.

        Returns:
            ids, starts and sizes, int64 `[tokens]`.
        """
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        starts = np.repeat(np.arange(len(text)), np.diff(_bytes_before(text)))
        return ids, starts, np.ones_like(ids)

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Each character as soon as its last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(bytes([token if token < self.vocab_size else _NO_UTF8]))
        yield decoder.decode(b"", final=True)


class FileTokenizer:
    """A `tokenizer.json` of the library `tokenizers`. Special tokens are neither added nor shown.

    Args:
        path: the file.
        special_tokens: whether text that spells a special token becomes that token (parse) or stays text.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """

    def __init__(self, path: Path | str, special_tokens: SpecialTokens = "parse") -> None:
        path = Path(path)
        check_regular(path, _FILE)
        _check_special_tokens(special_tokens)
        with library_errors(f"{path}: expected {_FILE}"):
            self._load(path.read_text(encoding="utf-8"), special_tokens)

    @classmethod
    def of_json(cls, text: str, special_tokens: SpecialTokens = "parse") -> "FileTokenizer":
        """The tokenizer that the content of a `tokenizer.json` describes."""
        tokenizer = cls.__new__(cls)
        _check_special_tokens(special_tokens)
        with library_errors("expected the content of a tokenizer.json, got something else"):
            tokenizer._load(text, special_tokens)
        return tokenizer

    def _load(self, text: str, special_tokens: SpecialTokens) -> None:
        msgspec.json.decode(text, type=_Content)
        self.tokenizer = tokenizers.Tokenizer.from_str(text)
        self.tokenizer.no_truncation()  # a file may ask for truncation and padding, which would change the text
        self.tokenizer.no_padding()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=0)
        self._json = self.tokenizer.to_str()
        self.special_tokens: SpecialTokens = special_tokens
        self.tokenizer.encode_special_tokens = special_tokens == "text"
        self.tokenizer.post_processor = None  # it adds special tokens, or moves offsets away from white space

    def to_json(self) -> str:
        """The content of the file."""
        return self._json

    @cached_property
    def special_token_texts(self) -> dict[int, str]:
        """How the special tokens are spelled, by id."""
        added = self.tokenizer.get_added_tokens_decoder().items()
        return {number: token.content for number, token in added if token.special}

    @property
    def has_special_tokens(self) -> bool:
        """Whether the tokenizer has special tokens, for which `special_tokens` matters."""
        return bool(self.special_token_texts)

    def __reduce__(self) -> tuple:
        """Make copies, here or in other processes, encode like this one; the library's copies parse special tokens."""
        return type(self).of_json, (self._json, self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self._encode(text).ids

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a text, and the byte of the text where each token ends.

        A character that several tokens share ends with the first of them.

        Args:
            text: bytes that are not UTF-8 appear in it as `surrogateescape` decodes them. Each is read as U+FFFD.

        Returns:
            ids, int64 `[tokens]`, and ends, int64 `[tokens]`, which never decrease. Text that the tokenizer drops lies
            between two ends, or after the last.
        """
        encoding = self._encode(text if text.isascii() else _ESCAPED.sub("\ufffd", text))
        characters = np.array([end for _, end in encoding.offsets], np.int64)  # NumPy is slower with pairs
        return np.array(encoding.ids, np.int64), _bytes_before(text)[np.maximum.accumulate(characters)]

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of a text, the character where each begins, and how many bytes of the text it stands for.

        Returns:
            ids, starts and sizes, int64 `[tokens]`. Special tokens that the text spells have size 0.
        """
        encoding = self._encode(text)
        ids, starts, stops = (
            np.array(x, np.int64)
            for x in (encoding.ids, [x for x, _ in encoding.offsets], [x for _, x in encoding.offsets])
        )
        sizes = np.diff(_bytes_before(text)[np.maximum.accumulate(stops)], prepend=0)
        if self.special_tokens == "parse":
            sizes[np.isin(ids, list(self.special_token_texts))] = 0
        return ids, starts, sizes

    def _encode(self, text: str) -> tokenizers.Encoding:
        with library_errors(f"the tokenizer cannot encode {text[:40]!r}..."):
            return self.tokenizer.encode(text, add_special_tokens=False)

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Pieces as soon as their characters are complete, with the spaces that tokens have only after other tokens."""
        recent, new = list(after)[-_RECENT:], []  # tokens whose text is out, and tokens after them
        fast = self._fast_decoder(recent)
        for token in tokens:
            new.append(token)
            text, fast = self._completed(recent, new, fast)
            yield text or ""
            if text is not None:
                recent, new = (recent + new)[-_RECENT:], []
                fast = fast or self._fast_decoder(recent)
        before, text = self._texts(recent, new)
        yield text[len(before) :]

    def _fast_decoder(self, recent: list[int]) -> DecodeStream | None:
        """The library's decoder for what follows some tokens; None if these do not form whole characters."""
        context, decoder = self._whole_characters(recent), DecodeStream(skip_special_tokens=True)
        if "\ufffd" in self._decode(context):
            return None
        with suppress(ValueError):  # as in `_completed`
            for token in context:
                self._step(decoder, token)
            return decoder
        return None

    def _completed(
        self, recent: list[int], new: list[int], fast: DecodeStream | None
    ) -> tuple[str | None, DecodeStream | None]:
        """Text that the last new token completes, or None; and the fast decoder, or None if it cannot continue."""
        if fast is not None and len(new) < _LONGEST:
            with suppress(ValueError):  # "Invalid prefix": the token changes text that was already yielded
                text = self._step(fast, new[-1])
                if text is None or "\ufffd" not in text:
                    return text, fast
        # With byte fallback, the number of U+FFFD also depends on earlier tokens, so text with any is decoded here.
        before, text = self._texts(recent, new)
        waits = (text == before or text.endswith("\ufffd")) and len(new) < _LONGEST
        return None if waits else text[len(before) :], None

    def _whole_characters(self, tokens: list[int]) -> list[int]:
        """The last tokens, starting where a character begins: starting inside one can spoil the whole text."""
        last = (tokens[-count:] for count in range(_CONTEXT, _RECENT + 1))
        return next((x for x in last if not self._decode(x).startswith("\ufffd")), tokens[-_CONTEXT:])

    def _step(self, decoder: DecodeStream, token: int) -> str | None:
        with library_errors(f"the tokenizer cannot decode token {token}"):
            return decoder.step(self.tokenizer, token)

    def _decode(self, tokens: list[int]) -> str:
        with library_errors(f"the tokenizer cannot decode tokens {tokens[:8]}..."):
            return self.tokenizer.decode(tokens)

    def _texts(self, recent: list[int], new: list[int]) -> tuple[str, str]:
        """The text of the context, and of the context with the new tokens, whose text depends on it."""
        context = self._whole_characters(recent)
        return self._decode(context), self._decode(context + new)


def _check_special_tokens(value: str) -> None:
    if value not in get_args(SpecialTokens):
        raise ValueError(f"special_tokens: expected one of {get_args(SpecialTokens)}, got {value!r}")


DataTokenizer = ByteTokenizer | FileTokenizer  # tokenizers that can make data


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever the library raises into a `ValueError` of one line; its panics are not `Exception`s."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def _bytes_before(text: str) -> np.ndarray:
    """How many bytes precede each character, then the size of the whole text, int64 `[characters + 1]`."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    sizes[(points >= 0xDC80) & (points <= 0xDCFF)] = 1  # a byte that is not UTF-8
    return np.concatenate([[0], sizes.cumsum()])
