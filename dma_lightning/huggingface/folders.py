"""Folders that `save_pretrained` of Transformers wrote, read as a configuration and weights of our decoder."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from dma_lightning.config import ModelConfig
from dma_lightning.files.reading import read_json
from dma_lightning.huggingface.config import FAMILIES, ConfigFile, config_fields
from dma_lightning.huggingface.weight_files import StoredTensor, open_weights
from dma_lightning.model import DogeForCausalLM


@dataclass(frozen=True, eq=False)
class PretrainedFolder:
    """Content of a folder; its tensors stay on disk until they are used."""

    path: Path
    model_type: str
    """Name of the family in `FAMILIES`."""
    fields: dict[str, Any] = field(repr=False)
    """Fields of `ModelConfig`, from `config.json`."""
    tensors: dict[str, StoredTensor] = field(repr=False)
    """Tensors by our names, including the output head if it is tied to the embedding."""

    @classmethod
    def open(cls, path: Path, families: Collection[str] = FAMILIES.keys()) -> Self:
        """Read `config.json`, and the names and shapes of the weights.

        Args:
            path: the folder.
            families: names of the model families that it may hold.

        Raises:
            ValueError: if a file is missing or damaged, or our decoder cannot express the model.
        """
        config = path / "config.json"
        name = "a Doge model" if set(families) == {"doge"} else f"a model ({', '.join(families)})"
        file = read_json(config, ConfigFile, f"config.json of {name}")
        stored = open_weights(path)
        try:
            fields = config_fields(file, families)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error
        tensors = {name.removeprefix("model."): x for name, x in stored.items()}
        if fields["tie_word_embeddings"] and "embed_tokens.weight" in tensors:
            tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
        assert file.model_type is not None  # it is in `families`
        return cls(path, file.model_type, fields, tensors)

    def unfilled_model(self, changed: dict[str, Any], may_have_more: bool = False) -> DogeForCausalLM:
        """Build the model on the meta device, after checking that the folder has all weights of a model of its family.

        Args:
            changed: fields of `ModelConfig` to override.
            may_have_more: whether the folder may have additional tensors.

        Raises:
            ValueError: if names or shapes of the weights do not match the model.
        """
        try:
            config = ModelConfig(**self.fields | changed)
            layers = len({name.split(".")[1] for name in self.tensors if name.startswith("layers.")})
            if config.num_hidden_layers != layers:  # checked first: building many layers takes long
                raise ValueError(
                    f"num_hidden_layers: expected {layers}, as in the weights, got {config.num_hidden_layers}"
                )
            with torch.device("meta"):
                model = DogeForCausalLM(config)
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from error
        expected, found = model.state_dict(), self.tensors
        lacks = {name for name in expected if name.endswith(FAMILIES[self.model_type].lacks)} - found.keys()
        wanted = {name: list(x.shape) for name, x in expected.items() if name not in lacks}
        got = {name: list(x.shape) for name, x in found.items() if name in expected or not may_have_more}
        if wanted != got:
            raise ValueError(f"{self.path}: weights do not match config.json: {_difference(wanted, got)}")
        return model

    def check_tied(self) -> None:
        """Check that the output head equals the embedding if they are tied.

        Raises:
            ValueError: if they differ.
        """
        if not self.fields["tie_word_embeddings"]:
            return
        head, table = self.tensors["lm_head.weight"], self.tensors["embed_tokens.weight"]
        if head is not table and not torch.equal(head.read(), table.read()):
            raise ValueError(
                f"{self.path}: tie_word_embeddings is set, but lm_head.weight differs from the embedding; "
                "set it to false in config.json to use both"
            )


def _difference(expected: dict[str, list[int]], found: dict[str, list[int]]) -> str:
    """Describe the first few names and shapes that differ."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    lines = [f"{name} expected {expected.get(name, 'none')}, got {found.get(name, 'none')}" for name in names[:5]]
    return "; ".join(lines) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
