"""Damaged and hostile models in the Hugging Face format: `config.json`, safetensors and their index."""

import dataclasses
import json
import random
import shutil
from functools import cache
from pathlib import Path

import torch
from fuzz_contract import check_reading, new_folder, place
from fuzz_mutations import change_bytes, change_file, change_value
from fuzz_told import told
from safetensors.torch import save_file

from dma_lightning import DogeForCausalLM, ModelConfig
from dma_lightning.huggingface.doge import load_doge, save_doge

_CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, keep_window_size=8,
)  # fmt: skip
_HEADER = 8  # bytes that say how long the JSON header of a safetensors file is


@cache
def _whole(sharded: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """An intact folder, and its weights."""
    torch.manual_seed(0)
    model = DogeForCausalLM(_CONFIG)
    folder = place().root / f"export-{sharded}"
    save_doge(model, folder)
    if sharded:
        named = {f"model.{name}": x for name, x in model.state_dict().items() if name != "lm_head.weight"}
        (folder / "model.safetensors").unlink()
        names, index = sorted(named), {}
        for number, part in enumerate((names[::2], names[1::2])):
            file = f"model-{number}.safetensors"
            save_file({name: named[name] for name in part}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        content = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder, {name: x.clone() for name, x in model.state_dict().items()}


def check_exports(seed: int) -> None:
    """`load_doge` returns the weights that were written and the configuration in the file, or raises an error."""
    rng = random.Random(seed)
    whole, weights = _whole(rng.random() < 0.3)
    with new_folder() as root:
        folder = root / "export"
        shutil.copytree(whole, folder)
        path = rng.choice(sorted(folder.iterdir()))
        words = _change_header(rng, path) if path.suffix == ".safetensors" and rng.random() < 0.5 else ""
        if words == "" and (path.suffix != ".safetensors" or (folder / "model.safetensors").exists()):
            words = change_file(rng, path)
        elif words == "":  # exports in several files have no checksums, so only damage that shows without them is found
            words = _cut(rng, path)

        def right(model: DogeForCausalLM) -> None:
            found = model.state_dict()
            assert found.keys() == weights.keys(), "other weights"
            for name, x in weights.items():
                y = found[name]
                assert x.dtype == y.dtype, f"{name} is {y.dtype}"
                assert torch.equal(x, y), f"changed content of {name} is accepted"
            _assert_said(model.config, folder / "config.json")
            assert model(torch.arange(5)[None]).shape == (1, 5, model.config.vocab_size)

        with told(seed, words):
            check_reading(lambda: load_doge(folder), right, folder, [path.name])


def _change_header(rng: random.Random, path: Path) -> str:
    """Change the header of a safetensors file, but not the data after it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:_HEADER], "little")
    header, rest = data[_HEADER : _HEADER + size], data[_HEADER + size :]
    kind = rng.choice(("value", "value", "bytes", "size"))
    if kind == "value":
        value, words = change_value(rng, json.loads(header))
        header = json.dumps(value).encode("utf-8", "surrogatepass")
        header += b" " * (-len(header) % 8)
    else:
        header, words = change_bytes(rng, header) if kind == "bytes" else (header, "size")
    said = rng.choice((0, 1, size - 1, size + 8, 10**8, 2**40, 2**63, 2**64 - 1)) if kind == "size" else len(header)
    path.write_bytes(said.to_bytes(_HEADER, "little") + header + rest)
    return f"{path.name}: header, {words}"


def _cut(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    size = rng.randrange(len(data))
    path.write_bytes(data[:size])
    return f"{path.name}: cut at {size} of {len(data)}"


def _assert_said(config: ModelConfig, path: Path) -> None:
    """Every field has the value and type that the file gives it: 4.0 and true are not numbers of heads."""
    said = json.loads(path.read_bytes())
    for name, value in dataclasses.asdict(config).items():
        if said.get(name) is not None:
            same = value == said[name] and isinstance(value, bool) == isinstance(said[name], bool)
            assert same, f"{name}: {value!r} for {said[name]!r}"
            whole = not isinstance(value, float) or isinstance(getattr(_CONFIG, name), float)
            assert whole, f"{name}: {value!r} is not a whole number"
