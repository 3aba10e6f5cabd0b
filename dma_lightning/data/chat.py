"""Conversations to fine-tune on: JSONL of messages, a chat template, and a loss on answers only."""

from functools import cached_property
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from dma_lightning.data.chat_templates import ChatTemplate, template_source, template_tokens
from dma_lightning.data.conversations import ChatEncoder, Conversations
from dma_lightning.data.find_files import user_path
from dma_lightning.data.packing import PackedAnswers
from dma_lightning.data.text import TokenizedDataModule
from dma_lightning.tokenizers import ByteTokenizer, FileTokenizer, SpecialTokens

TEMPLATE_KEY = "chat_template"  # in a checkpoint's state of the data


class ChatDataModule(TokenizedDataModule):
    """Supervised fine-tuning: learn the answers (messages with the role `assistant`) in conversations.

    Each line of a file is `{"messages": [{"role": ..., "content": ...}, ...]}`, and may also have `tools`, for the
    template. A chat template turns a conversation into text. A sequence holds one or more whole conversations, and each
    conversation sees only itself. Messages after the last answer are left out. The last conversations are for
    validation; `test` and `predict` also use them. At the start, each process reads and tokenizes all files, and then
    holds nine bytes per token in memory.

    Args:
        path: JSONL: a file, a folder (all files below it that are not hidden) or a glob; also .gz and .zst.
        tokenizer: a `tokenizer.json` of the library tokenizers, which checkpoints then carry along. Default: bytes.
        chat_template: a file with a Jinja template, or `simple` for a plain one that comes with this package. Default:
            the tokenizer's template, from `chat_template.jinja` or `tokenizer_config.json` in the tokenizer's folder.
        sequence_length: tokens in a sequence.
        too_long: what to do with conversations of more than sequence_length + 1 tokens: stop with an error (error), or
            leave them out and warn how many there were (drop).
        val_path: conversations for validation, instead of the last ones of path.
        val_fraction: share of the conversations, at their end, that is kept for validation, unless val_path is given.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
        special_tokens: whether the name of a special token in a message stays text (text) or becomes that token
            (parse). Names that the template writes always become tokens.

    Raises:
        ValueError: if the tokenizer or the template cannot be read; in `setup`, if a line is not a conversation with an
            answer, if the template refuses it, if it is too long, or if there are too few conversations. (With a
            tokenizer, these errors come as soon as a model is linked to the data.)
    """

    file_arguments = ("path", "val_path", "tokenizer", "chat_template")

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        sequence_length: int = 1024,
        too_long: Literal["error", "drop"] = "error",
        val_path: str | None = None,
        val_fraction: float = 0.05,
        batch_size: int = 8,
        num_workers: int = 0,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        self.tokenizer = ByteTokenizer() if tokenizer is None else FileTokenizer(tokenizer, special_tokens)
        super().__init__(self.tokenizer.vocab_size, sequence_length, batch_size, num_workers)
        self.save_hyperparameters()
        if val_path is None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        if too_long not in ("error", "drop"):
            raise ValueError(f"too_long: expected error or drop, got {too_long!r}")
        self.path, self.val_path, self.val_fraction, self.too_long = path, val_path, val_fraction, too_long
        file = None if tokenizer is None else user_path(tokenizer)
        literal: list[str] = []
        if isinstance(self.tokenizer, FileTokenizer) and special_tokens == "text":
            literal = list(self.tokenizer.special_token_texts.values())
        self.template = ChatTemplate(template_source(chat_template, file), template_tokens(file), literal)

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of a token; with a tokenizer, this reads the conversations first."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return 1.0
        return float(self._conversations.sizes.mean(dtype=np.float64))

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and answers, and the sequence length."""
        return f"{self._conversations.fingerprint}-{len(self._chosen[0])}-{self.sequence_length}"

    def setup(self, stage: str) -> None:
        """Pack the conversations."""
        train, val = self._chosen
        self.train_set = PackedAnswers(self._conversations, train, self.sequence_length)
        self.val_set = self.test_set = PackedAnswers(self._validation, val, self.sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: the same as for all tokenized data, and the chat template."""
        return super().state_dict() | {TEMPLATE_KEY: self.template.source}

    @cached_property
    def _conversations(self) -> Conversations:
        return self._read(self.path)

    @cached_property
    def _validation(self) -> Conversations:
        return self._conversations if self.val_path is None else self._read(self.val_path)

    @cached_property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the documents for training and for validation. No conversation is in both."""
        train = self._fitting(self._conversations)
        if self.val_path is not None:
            return train, self._fitting(self._validation)
        number = self._conversations.numbers[train]
        numbers = np.unique(number)
        border = len(numbers) - max(1, round(len(numbers) * self.val_fraction))
        if border < 1:
            raise ValueError(
                "path: expected at least two conversations, for training and validation, got "
                f"{len(numbers)} at {self.path!r}; give more, or name others with data.val_path"
            )
        is_train = number < numbers[border]
        return train[is_train], train[~is_train]

    def _read(self, path: str) -> Conversations:
        return ChatEncoder(self.tokenizer, self.template).read(path)

    def _fitting(self, data: Conversations) -> np.ndarray:
        """Numbers of the documents that fit into a sequence.

        Raises:
            ValueError: if one does not fit and `too_long` is error, or if none does.
        """
        room = self.sequence_length + 1
        fitting = np.flatnonzero(data.lengths <= room)
        if too_long := len(data.lengths) - len(fitting):
            longest = int(data.lengths.argmax())
            file, line = data.lines[data.numbers[longest]]
            expected = (
                f"path: expected conversations of at most sequence_length + 1 = {room} tokens, got {too_long} of "
                f"{len(data.lengths)} that are longer, the longest with {data.lengths[longest]} ({file}, line {line})"
            )
            if self.too_long == "error" or not len(fitting):
                raise ValueError(f"{expected}; raise data.sequence_length, or leave them out with data.too_long drop")
            rank_zero_warn(f"{expected}; these are left out")
        return fitting
