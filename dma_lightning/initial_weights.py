"""Weights that a run starts from: those of a checkpoint of ours, or of a model of Transformers.

Only weights are taken: optimizer, schedule and data start from scratch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning.pytorch as pl
import torch

from dma_lightning.checkpoints.weights import check_arguments, check_layers
from dma_lightning.config import ModelConfig
from dma_lightning.files.reading import check_regular
from dma_lightning.files.sha256_sums import check_sums
from dma_lightning.huggingface.folders import PretrainedFolder
from dma_lightning.huggingface.weight_files import StoredTensor
from dma_lightning.lora import has_adapters, own_weights
from dma_lightning.model import DogeForCausalLM
from dma_lightning.saved_run import SavedRun
from dma_lightning.tokenizers import FileTokenizer, Tokenizer

# Fields of a configuration that the weights determine.
_OF_WEIGHTS = (
    "vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "qk_norm", "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip

_OF_DATA = ("vocab_size", "max_position_embeddings")  # fields that the data determines

# Range of a drift that the weights do not have: too small to change logits by more than 1e-4.
_NO_DRIFT = (1e-4, 1e-4)

_LISTED = 8  # maximum number of names in a line


class Differences(NamedTuple):
    """Names of tensors that only one side has."""

    missing: list[str]
    """Tensors that only the model has; they keep the initial values of a new model."""
    extra: list[str]
    """Tensors that only the file has; they are left out."""


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights in a file or folder. They stay on disk until they are used."""

    path: Path
    config: ModelConfig
    """Configuration of the model that they were saved from."""
    padded_vocab_size: int | None
    """Value of this argument for a `LanguageModel` that starts from them."""
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    """The weights by the decoder's names."""
    folder: PretrainedFolder | None = field(default=None, repr=False)
    tokenizer: str | None = field(default=None, repr=False)
    """The `tokenizer.json` of their training text, if it is known."""

    @classmethod
    def open(cls, path: Path | str, kind: type[pl.LightningModule]) -> Self:
        """Open a file or folder, and compare its configuration with the shapes of its weights.

        Args:
            path: a checkpoint of ours, or a folder that `save_pretrained` of Transformers wrote.
            kind: class of the module that made the checkpoint, a `LanguageModel`.

        Raises:
            ValueError: if the path is neither, if it is damaged, or if this package cannot express the model.
        """
        path = Path(path).expanduser()
        if (path / "config.json").exists():
            return cls._of_folder(path)
        if not path.is_file():
            found = "a folder without config.json" if path.is_dir() else "nothing"
            raise ValueError(
                f"init_from: expected a checkpoint of one file, or a folder with the config.json and weights of a "
                f"model of Transformers, got {found} at {str(path)!r}"
            )
        return cls._of_checkpoint(SavedRun.open(path), kind)

    @classmethod
    def _of_folder(cls, path: Path) -> Self:
        folder = PretrainedFolder.open(path)
        config = folder.unfilled_model({}, may_have_more=True).config
        tokenizer = path / "tokenizer.json"
        if has_tokenizer := tokenizer.exists():
            check_regular(tokenizer, "a tokenizer of the library tokenizers")
        text = tokenizer.read_text(encoding="utf-8", errors="replace") if has_tokenizer else None
        # Many models have more rows in their embeddings than tokens in their tokenizers.
        return cls(path, config, config.vocab_size, folder.tensors, folder, text)

    @classmethod
    def _of_checkpoint(cls, saved: SavedRun, kind: type[pl.LightningModule]) -> Self:
        arguments = saved.model_arguments(kind)
        if not saved.weights:
            raise ValueError(f"init_from {saved.path}: expected a checkpoint with weights, got one without")
        if has_adapters(saved.weights):
            raise ValueError(
                f"init_from {saved.path}: expected weights without adapters, got some with adapters; merge them with "
                "`dma-lightning merge-lora`"
            )
        check_layers(saved.weights, arguments.get("num_hidden_layers", ModelConfig.num_hidden_layers), saved.path)
        check_arguments(saved.weights, kind, arguments, saved.path)
        weights = {name.removeprefix("model."): x for name, x in saved.content["state_dict"].items()}
        tensors = {name: StoredTensor(tuple(x.shape), x.detach) for name, x in weights.items()}
        known = {x.name for x in fields(ModelConfig)}
        config = ModelConfig(**{name: x for name, x in arguments.items() if name in known})
        config = replace(config, vocab_size=len(weights["embed_tokens.weight"]))
        return cls(saved.path, config, arguments.get("padded_vocab_size"), tensors, tokenizer=saved.tokenizer)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a `LanguageModel` with the model that the weights were saved from.

        Arguments that the data determines are left out. A drift, which only the user can add, has almost no effect at
        first.
        """
        known = {name: x for name, x in asdict(self.config).items() if name not in _OF_DATA}
        known["padded_vocab_size"] = self.padded_vocab_size
        return known if self.config.drift != "none" else known | {"drift_range": _NO_DRIFT}

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Compare the sizes of a model with those of the weights.

        Args:
            arguments: fields of `ModelConfig`; missing ones are not compared.

        Raises:
            ValueError: if one differs.
        """
        mine, theirs = _resolved(asdict(self.config)), _resolved(arguments)
        for name in (name for name in _OF_WEIGHTS if name in theirs and theirs[name] != mine[name]):
            was, got = mine[name], theirs[name]
            mend = "leave the option out, or begin without init_from"
            if name == "vocab_size":
                mend = "use the tokenizer that the weights were trained with"
                mend += f", or set padded_vocab_size to {was} to keep all rows" if got < was else ""
            raise ValueError(f"{name}: expected {was}, as the weights in {self.path} have, got {got}; {mend}")

    def fill(self, model: DogeForCausalLM) -> Differences:
        """Copy the weights into a model whose parameters are not sharded yet.

        Raises:
            ValueError: if sizes differ, if a file's hash is not the listed one, or if a tensor holds integers.
        """
        self.check(asdict(model.config))
        if self.folder is not None:
            check_sums(self.path)
            self.folder.check_tied()
        own = own_weights(model.state_dict())
        taken = own.keys() & self.tensors.keys()
        for name in sorted(taken):
            if (expected := tuple(own[name].shape)) != (got := self.tensors[name].shape):
                raise ValueError(
                    f"init_from {self.path}: expected {name} of shape {expected}, as the model has it with attention "
                    f"{model.config.attention!r}, got {got}; choose another attention"
                )
        for name in taken - ({"lm_head.weight"} if model.config.tie_word_embeddings else set()):
            tensor = self.tensors[name].read()
            if not tensor.is_floating_point():
                raise ValueError(f"init_from {self.path}: expected {name} in floating point, got {tensor.dtype}")
            with torch.no_grad():
                own[name].copy_(tensor)
        return Differences(*([x for x in names if x not in taken] for names in (own, self.tensors)))

    def lines(self, differences: Differences) -> list[str]:
        """What `fill` has done, as lines for users."""
        begin, count = f"init_from {self.path}: ", len(self.tensors) - len(differences.extra)
        found = [f"{begin}{count} tensors; optimizer, schedule and data start from scratch"]
        if differences.missing:
            found.append(f"{begin}missing there, so initialized as in a new model: {_listed(differences.missing)}")
        if differences.extra:
            found.append(f"{begin}there, but not in this model, so left out: {_listed(differences.extra)}")
        return found

    def knows_tokens_of(self, tokenizer: Tokenizer) -> bool:
        """Whether the data's tokens mean the same as for these weights, as far as that is known.

        Raises:
            ValueError: if the tokenizer of the weights cannot be read.
        """
        if self.tokenizer is None:
            return True
        if not isinstance(tokenizer, FileTokenizer):
            return False
        try:
            known = FileTokenizer.of_json(self.tokenizer, "text").tokenizer.get_vocab()
        except ValueError as error:
            raise ValueError(f"tokenizer of init_from {self.path}: {error}") from error
        return tokenizer.tokenizer.get_vocab().items() <= known.items()


def _resolved(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration, with the head width filled in if it follows from the others."""
    found = dict(arguments)
    if found.get("head_dim", 0) is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    return found


def _listed(names: Iterable[str]) -> str:
    """Names in one line; names that differ only in the layer number become one."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    shown = [f"{group} ({len(found)})" if len(found) > 1 else found[0] for group, found in alike.items()]
    more = len(shown) - _LISTED
    return ", ".join(shown[:_LISTED]) + (f" and {more} more" if more > 0 else "")
