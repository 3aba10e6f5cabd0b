"""A folder that `save_pretrained` of Transformers wrote: `config.json` and weights, as those of a decoder of ours."""

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
    """What a folder holds; its tensors stay on the disk until they are used."""

    path: Path
    model_type: str
    """Name of the family in `FAMILIES`."""
    fields: dict[str, Any] = field(repr=False)
    """Those of `ModelConfig` that `config.json` says."""
    tensors: dict[str, StoredTensor] = field(repr=False)
    """By our names, the output head of tied embeddings included."""

    @classmethod
    def open(cls, path: Path, families: Collection[str] = FAMILIES.keys()) -> Self:
        """Read `config.json`, and which weights there are.

        Args:
            path: the folder.
            families: which models it may hold.

        Raises:
            ValueError: if a file is missing or damaged, or the model is one that cannot be expressed here.
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
        """The model on no device, if the folder has all of its weights that models of this family have.

        Args:
            changed: fields of `ModelConfig` to set otherwise.
            may_have_more: whether the folder may have other tensors, too.

        Raises:
            ValueError: if names or shapes are not those of the model.
        """
        try:
            config = ModelConfig(**self.fields | changed)
            layers = len({name.split(".")[1] for name in self.tensors if name.startswith("layers.")})
            if config.num_hidden_layers != layers:  # before so many are made
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
            raise ValueError(f"{self.path}: weights do not belong to config.json: {_difference(wanted, got)}")
        return model

    def check_tied(self) -> None:
        """Compare the output head with the embedding, if they shall be the same.

        Raises:
            ValueError: if they differ.
        """
        if not self.fields["tie_word_embeddings"]:
            return
        head, table = self.tensors["lm_head.weight"], self.tensors["embed_tokens.weight"]
        if head is not table and not torch.equal(head.read(), table.read()):
            raise ValueError(
                f"{self.path}: tie_word_embeddings is set, but lm_head.weight is not the embedding; "
                "set it to false in config.json if both are meant"
            )


def _difference(expected: dict[str, list[int]], found: dict[str, list[int]]) -> str:
    """The first few names and shapes in which two differ."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    lines = [f"{name} expected {expected.get(name, 'none')}, got {found.get(name, 'none')}" for name in names[:5]]
    return "; ".join(lines) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
