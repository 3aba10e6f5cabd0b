"""A checkpoint that is opened once, and what commands need from it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl

from dma_lightning.checkpoints.arguments import model_arguments
from dma_lightning.checkpoints.io import read_checkpoint, read_newest
from dma_lightning.checkpoints.weights import Weights, saved_weights
from dma_lightning.data.base import POSITION_KEY
from dma_lightning.data.chat import TEMPLATE_KEY
from dma_lightning.data.restoring import RestorableDataModule, SavedData, data_arguments
from dma_lightning.data.text import SPECIAL_TOKENS_KEY, TOKENIZER_KEY
from dma_lightning.files.reading import as_kind
from dma_lightning.tokenizers import SpecialTokens


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single truth value
class SavedRun:
    """The content of a checkpoint, read once; what it says about model, data and tokenizer is checked on first use.

    Its tensors stay on disk until they are used. If the file is deleted meanwhile, its space is freed only when the
    `SavedRun` is.
    """

    path: Path
    """The file, or the folder with one file of each process."""
    content: dict[str, Any] = field(repr=False)
    """Everything in the file; for a folder, everything but weights and optimizer states."""

    @classmethod
    def open(cls, path: Path, map_location: Any = "cpu") -> Self:
        """Read a checkpoint; arguments and errors are those of `read_checkpoint`."""
        return cls(path, read_checkpoint(path, map_location))

    @classmethod
    def newest(cls, folders: Iterable[Path]) -> Self | None:
        """The newest complete checkpoint below some folders; errors are those of `read_newest`."""
        found = read_newest(folders)
        return None if found is None else cls(*found)

    @property
    def step(self) -> int:
        """Number of optimizer steps made."""
        return self.content.get("global_step", 0)

    @property
    def holds_training(self) -> bool:
        """Whether training can resume from it; otherwise it holds only weights."""
        return "optimizer_states" in self.content or "lr_schedulers" in self.content

    @cached_property
    def weights(self) -> Weights:
        """Names and shapes of the weights."""
        return saved_weights(self.content, self.path)

    def model_arguments(self, kind: type[pl.LightningModule]) -> dict[str, Any]:
        """Arguments of the model, whose class is `kind`.

        Raises:
            ValueError: if one is unknown or has another type.
        """
        return model_arguments(self.content, self.path, kind)

    @cached_property
    def data(self) -> SavedData:
        """What the checkpoint says about its data.

        Raises:
            ValueError: if an argument is unknown or has another type.
        """
        return data_arguments(self.content, self.path)

    def data_module(self, **changed: Any) -> RestorableDataModule:
        """The data module; arguments and errors are those of `RestorableDataModule.load_from_checkpoint`."""
        return self.data.module(self.content, self.path, changed)

    @cached_property
    def tokenizer(self) -> str | None:
        """The `tokenizer.json` of the text that the model was trained on, if there was one.

        Raises:
            ValueError: if it is not text.
        """
        checked: str | None = as_kind(self._data_state(TOKENIZER_KEY), str | None, f"{self.path}: {TOKENIZER_KEY}")
        return checked

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template of the conversations that the model was trained on, if there was one.

        Raises:
            ValueError: if it is not text.
        """
        states = (state for state in self.content.values() if isinstance(state, dict))
        own = (state for state in states if POSITION_KEY in state)  # the data's arguments also have the key
        found = next((state[TEMPLATE_KEY] for state in own if TEMPLATE_KEY in state), None)
        checked: str | None = as_kind(found, str | None, f"{self.path}: {TEMPLATE_KEY}")
        return checked

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """How training treated text that spells a special token; `text` if the checkpoint does not say.

        Raises:
            ValueError: if it is neither `text` nor `parse`.
        """
        before = self.data.arguments.get("special_tokens", "text")  # for older states, which do not say
        found = self._data_state(SPECIAL_TOKENS_KEY)
        checked: SpecialTokens = as_kind(
            before if found is None else found, SpecialTokens, f"{self.path}: {SPECIAL_TOKENS_KEY}"
        )
        return checked

    def _data_state(self, name: str) -> Any:
        """An entry of the data module's state, which is stored under its class name; None if there is none."""
        states = (state for state in self.content.values() if isinstance(state, dict))
        return next((state[name] for state in states if TOKENIZER_KEY in state and name in state), None)
