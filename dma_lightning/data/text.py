"""Text as bytes or as a tokenizer's tokens, packed into sequences of one length."""

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dma_lightning.data.base import SequenceDataModule
from dma_lightning.data.find_files import everybody_may_read, text_files, user_path
from dma_lightning.data.shards import Shard
from dma_lightning.data.text_cache import TextCache
from dma_lightning.data.text_formats import byte_pieces, check_plain, plain_chunks
from dma_lightning.data.windows import TokenWindows
from dma_lightning.tokenizers import ByteTokenizer, DataTokenizer, FileTokenizer, SpecialTokens

_SEPARATOR = b"\n"
# In a checkpoint's state of the data.
TOKENIZER_KEY, SPECIAL_TOKENS_KEY = "tokenizer_json", "special_tokens"


class TokenizedDataModule(SequenceDataModule):
    """Sequences of a tokenizer's tokens; checkpoints carry the tokenizer along.

    A subclass sets `tokenizer` before it calls `__init__`.
    """

    tokenizer: DataTokenizer

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: the position, and unless tokens are bytes, the tokenizer and its special_tokens."""
        return super().state_dict() | self._tokenizer_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint whose model has learned the tokens of this data.

        Raises:
            ValueError: if it was trained with another tokenizer.
        """
        if state.get(TOKENIZER_KEY) != self._tokenizer_state().get(TOKENIZER_KEY):
            raise ValueError(
                "tokenizer: expected the one that the checkpoint was trained with, got another; "
                "name its tokenizer.json, which `dma-lightning export-hf` writes out of the checkpoint"
            )
        super().load_state_dict(state)

    def _tokenizer_state(self) -> dict[str, str]:
        if isinstance(self.tokenizer, ByteTokenizer):
            return {}
        return {TOKENIZER_KEY: self.tokenizer.to_json(), SPECIAL_TOKENS_KEY: self.tokenizer.special_tokens}


class TextDataModule(TokenizedDataModule):
    """Language modeling on text files, byte by byte or with a tokenizer.

    The tokens of the text are written once into an array in a cache folder, which is mapped into memory. The name of
    the array depends on its content. If some users may not read the text, only its owner may read the array. The first
    part of the text is for training, and the last for validation, `test` and `predict`. Files are read as `prepare`
    reads them, without a byte order mark. A line feed is added to the end of each file that has text. Bytes that are
    not UTF-8 stay as they are; a tokenizer reads each as U+FFFD.

    Args:
        path: a file, a folder (all files below it that are not hidden) or a glob. Default: the English help topics
            that come with every Python (`pydoc_data.topics`).
        sequence_length: tokens in a sequence.
        val_fraction: share of the text, at its end, that is kept for validation.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
        cache_dir: folder of the array. Default: `dma-lightning` in the user's cache folder.
        tokenizer: a `tokenizer.json` of the library tokenizers, which checkpoints then carry along. Default: bytes.
        special_tokens: whether text that spells a special token of the tokenizer stays text or becomes that token
            (parse).

    Raises:
        ValueError: if the tokenizer cannot be read; in `prepare_data` or `setup`, if the path holds no text, if the
            text is too short or changes during reading, or if a link stands where an array should be. (With a
            tokenizer, these errors come as soon as a model is linked to the data.)
    """

    file_arguments = ("path", "cache_dir", "tokenizer")

    def __init__(
        self,
        path: str | None = None,
        sequence_length: int = 256,
        val_fraction: float = 0.1,
        batch_size: int = 16,
        num_workers: int = 0,
        cache_dir: str | None = None,
        tokenizer: str | None = None,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        self.tokenizer = ByteTokenizer() if tokenizer is None else FileTokenizer(tokenizer, special_tokens)
        super().__init__(self.tokenizer.vocab_size, sequence_length, batch_size, num_workers)
        self.save_hyperparameters()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        self.path, self.val_fraction, self.special_tokens = path, val_fraction, special_tokens
        self.cache_dir = user_path(cache_dir) if cache_dir else _user_cache() / "dma-lightning"
        self._is_prepared = False

    @classmethod
    def complete_saved(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a checkpoint; before the choice existed, tokenizers parsed special tokens."""
        return arguments if arguments.get("tokenizer") is None else {"special_tokens": "parse"} | arguments

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of a token; with a tokenizer, this writes the array first."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return 1.0
        self.prepare_data()
        return self._content[1] / max(1, self._cache.read().tokens)

    @property
    def fingerprint(self) -> str:
        """Hashes of text and tokenizer, and the sequence length."""
        return f"{self._cache.array.stem}-{self.sequence_length}"

    def prepare_data(self) -> None:
        """Write the array, unless it is there and complete. Called on one process per node."""
        if self._is_prepared:
            return
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        private = self.path is not None and not everybody_may_read(text_files(self.path))
        if not self._cache.is_whole():
            self._cache.write(self._tokens(), self._content[1], private)
        elif private:
            self._cache.make_private()
        self._is_prepared = True

    def setup(self, stage: str) -> None:
        """Map the array and split it."""
        train, val = self.part("train"), self.part("val")
        self.train_set = TokenWindows([train], self.sequence_length)
        self.val_set = self.test_set = TokenWindows([val], self.sequence_length)
        if not (len(self.train_set) and len(self.val_set)):
            raise ValueError(
                f"text of {val.stop} tokens: the training and validation parts ({val.start} and "
                f"{val.stop - val.start} tokens) must each exceed sequence_length = {self.sequence_length}; "
                "give more text, shorten sequence_length or change val_fraction"
            )

    def part(self, name: Literal["all", "train", "val"]) -> Shard:
        """All tokens of the array that `prepare_data` has written, or its training or validation part."""
        cache, record = self._cache, self._cache.read()
        tokens, border = record.tokens, record.tokens - round(record.tokens * self.val_fraction)
        start, stop = {"all": (0, tokens), "train": (0, border), "val": (border, tokens)}[name]
        return Shard(
            str(cache.array),
            None,
            cache.dtype.name,
            start,
            stop,
            str(cache.lengths) if cache.with_lengths else None,
            record.lengths_dtype if cache.with_lengths else None,
            byte_tokens=not cache.with_lengths,
        )

    @cached_property
    def _content(self) -> tuple[str, int]:
        """Digest and size in bytes of the whole text."""
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks():
            digest.update(chunk)
            size += len(chunk)
        if not size:
            raise ValueError(f"path: expected text, got only empty files at {self.path!r}")
        return digest.hexdigest()[:32], size

    @cached_property
    def _cache(self) -> TextCache:
        digest, _ = self._content
        name, with_lengths = f"bytes-{digest}", False
        if not isinstance(self.tokenizer, ByteTokenizer):
            tokenizer = hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest()
            name = f"tokens-{digest}-{tokenizer[:16]}{'-text' * (self.special_tokens == 'text')}"
            with_lengths = True
        return TextCache(self.cache_dir / f"{name}.bin", self.vocab_size, with_lengths)

    def _tokens(self) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
        """The text in pieces: the tokens, how many bytes each stands for, and the bytes of the piece."""
        if isinstance(self.tokenizer, ByteTokenizer):
            for chunk in self._unchanged_chunks():
                yield np.frombuffer(chunk, np.uint8), None, len(chunk)
            return
        for piece in byte_pieces(self._unchanged_chunks()):
            tokens, ends = self.tokenizer.encode_with_ends(piece.decode(errors="surrogateescape"))
            yield tokens, np.diff(ends, prepend=0), len(piece)

    def _unchanged_chunks(self) -> Iterator[bytes]:
        """The text in pieces, checked against the text that the array is named after.

        Raises:
            ValueError: at the end, if the text has changed.
        """
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
            yield chunk
        if digest.hexdigest()[:32] != self._content[0]:
            raise ValueError(
                f"path: expected a text that nobody changes while it is read, got another at {self.path!r} the second "
                "time; run again when the text is complete"
            )

    def _chunks(self) -> Iterator[bytes]:
        """The whole text, in pieces."""
        if self.path is None:
            from pydoc_data.topics import topics  # half a megabyte that other corpora do not need

            for topic in topics.values():
                yield topic.encode() + _SEPARATOR
            return
        files = text_files(self.path)
        for file in files:  # check all before reading the first
            check_plain(file)
        for file in files:
            has_text = False
            for chunk in plain_chunks(file):
                has_text = True
                yield chunk
            if has_text:
                yield _SEPARATOR


def _user_cache() -> Path:
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
