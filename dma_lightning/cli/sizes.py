"""`dma-lightning sizes`: the cost of each attention in a model of one shape."""

from dataclasses import fields, replace
from pathlib import Path

import torch
from jsonargparse import ArgumentError

from dma_lightning.cli.parsing import Parser, set_up_parsing
from dma_lightning.cli.shipped_configs import find_config, what_was_meant
from dma_lightning.config import ModelConfig
from dma_lightning.language_model import LanguageModel
from dma_lightning.mixers import MIXERS
from dma_lightning.model import DogeForCausalLM


def sizes(path: Path, sequence_length: int = 4096) -> None:
    """Print parameters, cache and FLOPs of a model with each attention, as a Markdown table.

    Parameters and FLOPs leave out embeddings and output head. The cache is that of all layers after a sequence. FLOPs
    are per token in a forward pass, averaged over the sequence.

    Args:
        path: a YAML file with `model:`, or the name of a shipped config, such as 80m.
        sequence_length: length of the sequence in tokens.
    """
    print("\n".join(size_lines(path, sequence_length)))


def size_lines(path: Path, sequence_length: int) -> list[str]:
    """Lines of the table.

    Raises:
        ValueError: if the file is missing or not a model configuration, or the length is below 1.
    """
    given = str(path)
    path = next((x for name in (given, f"model/{given}") if (x := Path(find_config(name))).exists()), path)
    if not path.exists():
        raise ValueError(f"path: expected a file or the name of a shipped config, got {given!r}{what_was_meant(given)}")
    if sequence_length < 1:
        raise ValueError(f"sequence_length: expected at least 1, got {sequence_length}")
    lines = [
        f"| `{path.stem}`, {sequence_length:,} tokens | parameters | of which attention | cache, numbers per token | "
        "forward FLOPs per token |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    shape = read_config(path)
    for name in MIXERS:
        arguments = shape.attention_args if name == shape.attention else {}
        with torch.device("meta"):
            model = DogeForCausalLM(replace(shape, attention=name, attention_args=arguments))
        mixers = model.mixers
        own = sum(p.numel() for mixer in mixers for p in mixer.parameters())
        cache = sum(mixer.cache_elements(sequence_length) for mixer in mixers) / sequence_length
        total = model.num_non_embedding_parameters
        flops = 2 * total + sum(mixer.mixing_flops(sequence_length) for mixer in mixers)
        cells = (f"{total / 1e6:.2f}M", f"{own / 1e6:.2f}M", f"{cache:,.0f}", f"{flops / 1e9:.3f}G")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def read_config(path: Path) -> ModelConfig:
    """Read the model configuration in a YAML file as `fit` does.

    Raises:
        ValueError: if the file is missing or not such a configuration.
    """
    set_up_parsing()
    parser = Parser(exit_on_error=False)
    parser.add_lightning_class_args(LanguageModel, "model")
    try:
        options = parser.parse_path(str(path)).model
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: expected a YAML file with model:, like the shipped config 80m: {error}") from error
    return ModelConfig(**{field.name: options[field.name] for field in fields(ModelConfig)})
