"""A checkpoint to evaluate, and its data at another length."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from dma_lightning.data import SequenceDataModule
from dma_lightning.data.needles import HaystackDataModule
from dma_lightning.language_model import LanguageModel
from dma_lightning.saved_run import SavedRun
from dma_lightning.trained_models import model_of, open_checkpoint
from dma_lightning.vocabularies import check_vocabulary

LENGTH_FACTORS = (0.25, 0.5, 1, 1.5, 2, 4, 8)
"""The default lengths of an evaluation, as multiples of the training length."""

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A checkpoint to evaluate.

    Attributes:
        saved: the checkpoint.
        module: its model, in the dtype of its weights.
        device: the model's device.
    """

    saved: SavedRun
    module: LanguageModel
    device: str

    @classmethod
    def open(cls, path: Path, device: str | None = None, backend: str | None = None) -> Self:
        """Read a checkpoint.

        Args:
            path: path of the checkpoint.
            device: where to compute. Default: the GPU if there is one.
            backend: attention backend. Default: the checkpoint's.

        Raises:
            ValueError: if there is no such file or device, or the file is damaged.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        saved = open_checkpoint(path, device)
        return cls(saved, model_of(saved, device, backend), device)

    @property
    def training_length(self) -> int:
        """Tokens in a training sequence; if the checkpoint names no data, the most tokens that the model takes."""
        longest = self.module.model.config.max_position_embeddings
        return int(self.saved.data.arguments.get("sequence_length", longest))

    def lengths(self, lengths: list[int] | None, factors: Sequence[float]) -> list[int]:
        """The requested lengths, by default multiples of the training length, each once and sorted.

        Raises:
            ValueError: if one is below 1, or there is none.
        """
        if lengths is None:
            return sorted({max(1, round(factor * self.training_length)) for factor in factors})
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: expected at least one, each at least 1, got {lengths}")
        return sorted(set(lengths))

    def data(self, path: str | None = None, **changed: Any) -> SequenceDataModule:
        """The data of the training run, with some arguments changed.

        Args:
            path: the user's text, instead of the one that the checkpoint names. All of it is used, unless the data has
                no argument `val_path`; then only the validation part is used.
            changed: further arguments that replace the checkpoint's.

        Raises:
            ValueError: if the checkpoint names no data of this package, takes no such argument, or names files that
                neither the run's own configuration nor the user names; if the data has tokens that the model does not
                know.
        """
        found, changed = self.saved.data, {name: x for name, x in changed.items() if x is not None}
        if found.kind is None:
            raise ValueError(
                f"{self.saved.path}: expected a checkpoint that was trained on data of dma_lightning, got "
                f"{found.class_path or 'one that names no data'}"
            )
        files = found.kind.file_arguments
        given: dict[str, Any] = {} if path is None else {"path": path}
        if strange := (given | changed).keys() - {"sequence_length", *files}:
            raise ValueError(f"{sorted(strange)[0]}: expected none, since {found.kind.__name__} reads no such file")
        if path is not None and "val_path" in files:
            given["val_path"] = path  # so that the evaluation uses all of it
        if "cache_dir" in found.files:
            given["cache_dir"] = None  # the cache may be anywhere
        changed = given | changed
        if missing := {name: x for name, x in found.files.items() if name not in changed}:
            raise ValueError(
                f"{self.saved.path}: expected files that its run's configuration names, got {missing}; name your own "
                f"with {' and '.join(f'--{name}' for name in missing)}"
            )
        module = self.saved.data_module(**changed)
        assert isinstance(module, SequenceDataModule)  # as is all data of this package
        check_vocabulary(module.vocab_size, self.module.model.vocab_size)
        return module

    def haystacks(self, path: str | None = None) -> HaystackDataModule:
        """The needle data that the model was trained on; arguments and errors are those of `data`.

        Raises:
            ValueError: if the model was trained on something else.
        """
        kind = self.saved.data.kind
        if kind is not None and not issubclass(kind, HaystackDataModule):
            raise ValueError(
                f"{self.saved.path}: expected a checkpoint that was trained on needles, got one on {kind.__name__}; "
                "see `extrapolation`"
            )
        module = self.data(path)
        assert isinstance(module, HaystackDataModule)
        module.prepare_data()
        module.setup("test")
        return module


def possible_lengths(lengths: Sequence[int], make: Callable[[int], Made]) -> dict[int, Made]:
    """The result of `make` for each length; lengths for which it fails are left out, with a printed reason.

    Raises:
        ValueError: if all are left out.
    """
    made, errors = {}, {}
    for length in lengths:
        try:
            made[length] = make(length)
        except ValueError as error:
            errors[length] = error
    if not made:
        first = errors[lengths[0]]
        raise ValueError(f"lengths: expected one that the data can have, got {list(lengths)}: {first}") from first
    for length, reason in errors.items():
        print(f"length {length:,} is left out: {reason}", file=sys.stderr)
    return made
