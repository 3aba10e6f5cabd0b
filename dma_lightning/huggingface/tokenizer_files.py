"""A tokenizer's files in a model's folder."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dma_lightning.files.reading import check_regular
from dma_lightning.tokenizers import library_errors

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files in a folder.

    It follows links only within the folder, and to the blobs of the Hugging Face cache if the folder is a snapshot
    there. Otherwise a downloaded folder could get any file of this machine copied and published.

    Raises:
        ValueError: if a tokenizer file is not a regular file, or is a link to a file elsewhere.
    """
    inside = source.resolve()
    roots = [inside, inside.parents[1] / "blobs"] if inside.parent.name == "snapshots" else [inside]
    for path in (source / name for name in _TOKENIZER_FILES):
        if not path.exists() and not path.is_symlink():
            continue
        check_regular(path, "a tokenizer file")
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise ValueError(
                f"{path}: expected a file in this folder, got a link to {path.resolve()}; to use that file, copy it "
                "here"
            )
        shutil.copyfile(path, target / path.name)


def describe_tokens(folder: Path, config: dict[str, Any]) -> None:
    """Write the tokens that start, end and pad texts to files for Transformers, unless the files exist.

    `generate` reads `generation_config.json`. `AutoTokenizer` reads `tokenizer_config.json`, which is written only
    beside a `tokenizer.json`. The first token that ends texts also pads them; attention masks tell the two apart.

    Args:
        folder: the model's folder.
        config: the model's configuration, with `bos_token_id` and `eos_token_id`.

    Raises:
        ValueError: if the library cannot read the tokenizer.
    """
    ends = config["eos_token_id"]
    ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends}
    ids["pad_token_id"] = end = next(iter(ends), None) if isinstance(ends, list) else ends
    ids = {name: token for name, token in ids.items() if token is not None}
    if ids and not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    path = folder / "tokenizer.json"
    if not path.exists() or (folder / "tokenizer_config.json").exists():
        return
    with library_errors(str(path)):
        tokenizer = Tokenizer.from_file(str(path))
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in (("bos_token", config["bos_token_id"]), ("eos_token", end), ("pad_token", end)):
        if token is not None and (spelled := tokenizer.id_to_token(token)) is not None:
            told[name] = spelled
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")


def byte_tokenizer_json() -> str:
    """Content of a `tokenizer.json` whose tokens are the 256 byte values of UTF-8 text.

    Byte-level tokenizers spell each byte as a visible character; bytes without one get characters from 256 on.
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = [byte for byte in range(256) if byte not in seen]
    spelled = {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(unseen)}
    tokenizer = Tokenizer(models.BPE(vocab={spelled[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def has_bytes(path: Path) -> bool:
    """Whether a `tokenizer.json` has the tokens of `byte_tokenizer_json`, or does not exist."""
    if not path.exists():
        return True
    with suppress(ValueError), library_errors(str(path)):
        return Tokenizer.from_file(str(path)).get_vocab() == Tokenizer.from_str(byte_tokenizer_json()).get_vocab()
    return False
