"""Text as tokens, bytes or those of a tokenizer, packed to sequences of one length."""

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dma_lightning.atomic_files import atomic_write
from dma_lightning.data.base import SequenceDataModule
from dma_lightning.data.files import COMPRESSED, JSONL, text_files
from dma_lightning.data.shards import Shard
from dma_lightning.data.windows import TokenWindows
from dma_lightning.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer

_CHUNK = 1 << 20
_SEPARATOR = b"\n"
_PIECE = 4 << 20  # bytes that a tokenizer takes at once, if no line ends before
TOKENIZER_KEY = "tokenizer_json"  # in a checkpoint's state of the data


class TokenizedDataModule(SequenceDataModule):
    """Sequences of a tokenizer's tokens, which checkpoints carry along.

    A subclass sets `tokenizer` before it calls `__init__`.
    """

    tokenizer: Tokenizer

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries along: position, and the tokenizer, unless tokens are bytes."""
        return super().state_dict() | self._tokenizer_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint whose model has learned the tokens of this data.

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
        return {} if isinstance(self.tokenizer, ByteTokenizer) else {TOKENIZER_KEY: self.tokenizer.to_json()}


class TextDataModule(TokenizedDataModule):
    """Language modelling on text files, byte by byte or with a tokenizer.

    The text is written once into a memory-mapped array in a cache folder, under a name made from its content. Its
    first part is for training and its last for validation; `test` and `predict` use the validation part as well.

    Args:
        path: a file, a folder (all files below it that are not hidden) or a glob. Default: the English help topics
            that every Python carries (`pydoc_data.topics`).
        sequence_length: tokens in a sequence.
        val_fraction: share of the text, at its end, that is kept for validation.
        batch_size: sequences in a batch of each process.
        num_workers: processes that load data beside each training process.
        cache_dir: where the array is kept. Default: `dma-lightning` in the user's cache folder.
        tokenizer: a `tokenizer.json` of the library tokenizers, which checkpoints then carry along. Default: bytes.

    Raises:
        ValueError: if the tokenizer cannot be read; in `prepare_data` or `setup`, if the path holds no text or the text
            is too short (with a tokenizer, a model that is linked to the data asks for it at once).
    """

    def __init__(
        self,
        path: str | None = None,
        sequence_length: int = 256,
        val_fraction: float = 0.1,
        batch_size: int = 16,
        num_workers: int = 0,
        cache_dir: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.tokenizer = ByteTokenizer() if tokenizer is None else FileTokenizer(tokenizer)
        super().__init__(self.tokenizer.vocab_size, sequence_length, batch_size, num_workers)
        self.save_hyperparameters()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        self.path, self.val_fraction = path, val_fraction
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else _user_cache() / "dma-lightning"

    @property
    def bytes_per_token(self) -> float:
        """Mean length of a token; with a tokenizer, the array is written for it."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return 1.0
        self.prepare_data()
        tokens = self._cache_file.stat().st_size // self._dtype.itemsize
        return self._content[1] / max(1, tokens)

    @property
    def fingerprint(self) -> str:
        """Hashes of text and tokenizer, and how long sequences are."""
        return f"{self._cache_file.stem}-{self.sequence_length}"

    def prepare_data(self) -> None:
        """Write the array, unless it is there. Called on one process per node."""
        if not self._cache_file.exists():
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._cache_file, f".{secrets.token_hex(8)}.tmp") as file:
                file.writelines(self._tokens())

    def setup(self, stage: str) -> None:
        """Map the array and split it."""
        tokens = self._cache_file.stat().st_size // self._dtype.itemsize
        border = tokens - round(tokens * self.val_fraction)
        train, val = (
            Shard(str(self._cache_file), None, self._dtype.name, *part) for part in ((0, border), (border, tokens))
        )
        self.train_set = TokenWindows([train], self.sequence_length)
        self.val_set = self.test_set = TokenWindows([val], self.sequence_length)
        if not (len(self.train_set) and len(self.val_set)):
            raise ValueError(
                f"text of {tokens} tokens: the training and validation parts ({border} and "
                f"{tokens - border} tokens) must each exceed sequence_length = {self.sequence_length}; "
                "give more text, shorten sequence_length or change val_fraction"
            )

    @property
    def _dtype(self) -> np.dtype:
        """The smallest that holds every token."""
        return np.min_scalar_type(self.vocab_size - 1)

    @cached_property
    def _content(self) -> tuple[str, int]:
        """Digest and size in bytes of the whole text."""
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks():
            digest.update(chunk)
            size += len(chunk)
        return digest.hexdigest()[:32], size

    @cached_property
    def _cache_file(self) -> Path:
        digest, _ = self._content
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.cache_dir / f"bytes-{digest}.bin"
        tokenizer = hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest()
        return self.cache_dir / f"tokens-{digest}-{tokenizer[:16]}.bin"

    def _tokens(self) -> Iterator[bytes]:
        """The array, piece by piece."""
        if isinstance(self.tokenizer, ByteTokenizer):
            yield from self._chunks()
            return
        for text in _pieces(self._chunks()):
            yield np.array(self.tokenizer.encode(text), dtype=self._dtype).tobytes()

    def _chunks(self) -> Iterator[bytes]:
        """The whole text, piece by piece."""
        if self.path is None:
            from pydoc_data.topics import topics  # half a megabyte that other corpora do not need

            for topic in topics.values():
                yield topic.encode() + _SEPARATOR
            return
        files = text_files(self.path)
        if packed := [file for file in files if file.suffix.lower() in (*JSONL, *COMPRESSED)]:
            raise ValueError(
                f"path: expected plain text, got {packed[0]}; `dma-lightning prepare` reads such files, for "
                "PreparedDataModule"
            )
        if not any(file.stat().st_size for file in files):
            raise ValueError(f"path: expected text, got only empty files at {self.path!r}")
        for file in files:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
            yield _SEPARATOR


def _pieces(chunks: Iterable[bytes]) -> Iterator[str]:
    """The text in pieces that a tokenizer takes at once; what is no UTF-8 becomes U+FFFD."""
    return (piece.decode(errors="replace") for piece in byte_pieces(chunks))


def byte_pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Text in pieces of whole lines, or of whole words if lines are long.

    A tokenizer sees one piece at a time, so where two meet, a token may be another than in the whole.
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
    """Where the last character begins, so that it is not cut."""
    end = len(text) - 1
    while end > 0 and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
