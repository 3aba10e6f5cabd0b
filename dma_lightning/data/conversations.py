"""Conversations in JSONL, as tokens of which some are answers.

T tokens of all documents, D documents.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dma_lightning.data.chat_templates import ANSWERER, ChatTemplate, ChatText
from dma_lightning.data.find_files import text_files
from dma_lightning.data.text_formats import read_records
from dma_lightning.tokenizers import DataTokenizer, FileTokenizer


@dataclass(frozen=True, eq=False)
class Conversations:
    """Documents one after another. A document is a conversation, or a part of one.

    Attributes:
        tokens: int32 `[T]`.
        is_answer: whether a token belongs to an answer, bool `[T]`.
        sizes: bytes of text that a token stands for, uint32 `[T]`.
        ends: where each document ends, int64 `[D]`.
        numbers: number of each document's conversation, int64 `[D]`.
        lines: the file of each conversation and the number of its line there.
    """

    tokens: np.ndarray
    is_answer: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray
    lines: list[tuple[Path, int]]

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins, int64 `[D]`."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 `[D]`."""
        return np.diff(self.ends, prepend=0)

    @property
    def fingerprint(self) -> str:
        """Hash of tokens and answers."""
        digest = hashlib.sha256(self.tokens.data)
        for part in (self.is_answer, self.ends):
            digest.update(part.data)
        return digest.hexdigest()


class ChatEncoder:
    """Turns conversations into tokens.

    Args:
        tokenizer: makes tokens of the texts.
        template: writes conversations. Special tokens that it writes become tokens; in its `literal` texts, they stay
            text.
    """

    def __init__(self, tokenizer: DataTokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template, self.parsing = tokenizer, template, tokenizer
        if isinstance(tokenizer, FileTokenizer):
            self.parsing = FileTokenizer.of_json(tokenizer.to_json(), "parse")

    def read(self, path: str) -> Conversations:
        """All conversations in the files of a path, in order.

        Args:
            path: a file, folder or glob of JSONL, as `text_files` takes it.

        Raises:
            ValueError: if a file holds something else; the message names file and line.
        """
        parts, numbers = [], []
        lines: list[tuple[Path, int]] = []
        for file in text_files(path):
            for line, record in read_records(file):
                with _in_line(file, line):
                    made = list(self.encode(record))
                parts += made
                numbers += [len(lines)] * len(made)
                lines.append((file, line))
        if not parts:
            raise ValueError(f"path: expected conversations, got only empty files at {path!r}")
        tokens, is_answer, sizes = (np.concatenate(x) for x in zip(*parts, strict=True))
        ends = np.cumsum([len(x) for x, *_ in parts], dtype=np.int64)
        return Conversations(tokens, is_answer, sizes, ends, np.array(numbers, np.int64), lines)

    def encode(self, record: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Tokens, whether each belongs to an answer, and sizes of each document of a conversation.

        Raises:
            ValueError: if it has no messages or no answer, or if the template refuses it.
        """
        for text in self.template.texts(_messages(record), record.get("tools")):
            tokens, starts, sizes = self._pieces(text)
            borders = np.array(text.answers, np.int64).reshape(-1)
            is_answer = np.searchsorted(borders, starts, side="right") % 2 == 1
            if not is_answer[1:].any():
                raise ValueError("expected an answer with text, got none in what the chat template writes")
            yield tokens.astype(np.int32), is_answer, sizes.astype(np.uint32)

    def _pieces(self, text: ChatText) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The whole text, or, if a message spells a special token, that and what is around it by itself."""
        borders = [0, *(x for span in text.literal for x in span), len(text.text)]
        found = []
        for i, (start, end) in enumerate(pairwise(borders)):
            tokenizer = self.tokenizer if i % 2 else self.parsing
            tokens, starts, sizes = tokenizer.encode_with_starts(text.text[start:end])
            found.append((tokens, starts + start, sizes))
        tokens, starts, sizes = (np.concatenate(x) for x in zip(*found, strict=True))
        return tokens, starts, sizes


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a line.

    Raises:
        ValueError: if there are none, one is something else, or none is an answer.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"expected a field 'messages' with a list of at least one message, got the fields "
            f"{ ({name: type(value).__name__ for name, value in record.items()}) }"
        )
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        content = fields.get("content")
        if not isinstance(fields.get("role"), str) or not (isinstance(content, str) or fields.get("tool_calls")):
            raise ValueError(
                f"message {number}: expected an object with the strings 'role' and 'content', got {str(message)[:60]}"
            )
    roles = [message["role"] for message in messages]
    if ANSWERER not in roles:
        raise ValueError(f"expected a message with the role {ANSWERER!r}, which is the answer, got only {roles[:8]}")
    if not isinstance(record.get("tools"), list | None):
        raise ValueError(f"tools: expected a list for the chat template, or none, got {str(record['tools'])[:60]}")
    return messages


@contextmanager
def _in_line(file: Path, number: int) -> Iterator[None]:
    """A context whose errors name the line."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise ValueError(f"{file}, line {number}: expected text, got half of a character: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: {error}") from error
