"""Damaged and hostile tokenizers, text caches, and folders from `dma-lightning prepare`.

N sequence length.
"""

import contextlib
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from fuzz_contract import check_reading, new_folder, place
from fuzz_mutations import change_file, change_json
from fuzz_told import told
from tokenizers import decoders, models, pre_tokenizers, trainers

from dma_lightning.cli.prepare import prepare
from dma_lightning.data import PreparedDataModule, SequenceDataModule, TextDataModule
from dma_lightning.tokenizers import FileTokenizer

_LENGTH = 16
_TEXTS = [f"document {i} of {i % 7} things, and what is said of them; " * (1 + i % 4) for i in range(24)]


@cache
def source() -> Path:
    """A folder with a text, both plain and as JSONL documents, and a tokenizer for it."""
    folder = place().root / "source"
    folder.mkdir()
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in _TEXTS))
    (folder / "plain.txt").write_text("\n".join(_TEXTS))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make(output: Path, with_tokenizer: bool) -> None:
    """Run `prepare` on the text."""
    tokenizer = str(source() / "tokenizer.json") if with_tokenizer else None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(str(source() / "lines.jsonl"), output, tokenizer, shard_tokens=700, processes=1)


@cache
def _whole(with_tokenizer: bool) -> tuple[Path, dict[str, Any]]:
    """An intact folder, and its content."""
    folder = place().root / f"whole-{with_tokenizer}"
    make(folder, with_tokenizer)
    return folder, content(_prepared(folder))


def check_prepared(seed: int) -> None:
    """`PreparedDataModule` and all its sequences."""
    rng = random.Random(seed)
    whole, expected = _whole(rng.random() < 0.5)
    with new_folder() as root:
        folder = root / "prepared"
        shutil.copytree(whole, folder, symlinks=True)
        path = rng.choice([file for file in sorted(folder.iterdir()) if not file.name.startswith(".")])
        words = change_file(rng, path)
        with told(seed, words):
            check_reading(lambda: content(_prepared(folder)), _is(expected), folder, [path.name])


def check_preparing(seed: int) -> None:
    """`prepare` in a folder with earlier output: it ends with the same content, or says what is wrong."""
    rng = random.Random(seed)
    with_tokenizer = rng.random() < 0.5
    whole, expected = _whole(with_tokenizer)
    with new_folder() as root:
        folder = root / "prepared"
        shutil.copytree(whole, folder)
        words = "finished"
        if rng.random() < 0.5:  # interrupted
            (folder / "manifest.json").unlink()
            words = "not finished"
            for file in folder.glob("shard-00002*") if rng.random() < 0.5 else ():
                file.unlink()
        files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
        path = rng.choice([file for file in files if file.suffix == ".json" or rng.random() < 0.3])
        words = f"{words}, {change_file(rng, path)}"

        def again() -> dict[str, Any]:
            make(folder, with_tokenizer)
            return content(_prepared(folder))

        with told(seed, words):
            check_reading(again, _is(expected), folder, [path.name], may_start=True)


def check_tokenizers(seed: int) -> None:
    """`FileTokenizer`: a file that it accepts encodes and decodes, or says that it cannot."""
    rng = random.Random(seed)
    with new_folder() as folder:
        path = folder / "tokenizer.json"
        if rng.random() < 0.3:
            shutil.copyfile(source() / "tokenizer.json", path)
        else:  # a small one, so that changes reach every part of it
            path.write_text(json.dumps(_small_tokenizer(rng)))
        if rng.random() < 0.1:
            words = change_file(rng, path, nodes=1)
        else:
            data, words = change_json(rng, path.read_bytes())
            path.write_bytes(data)

        def use() -> None:
            tokenizer = FileTokenizer(path)
            tokens = tokenizer.encode("ab a document")
            assert all(0 <= token < tokenizer.vocab_size for token in tokens), "tokens outside the vocabulary"
            "".join(tokenizer.decode_stream(tokens[:5]))

        with told(seed, words):
            check_reading(use, lambda _: None, folder, [path.name, "tokenizer"])


def check_text(seed: int) -> None:
    """`TextDataModule` and its cache."""
    rng = random.Random(seed)
    tokenizer = rng.choice((None, str(source() / "tokenizer.json")))
    expected = _text_content(tokenizer)
    with new_folder() as root:
        data = _text(root / "cache", tokenizer)
        data.prepare_data()
        path = rng.choice([file for file in sorted((root / "cache").iterdir()) if file.suffix == ".bin"])
        words = change_file(rng, path, nodes=0.3)

        def again() -> dict[str, Any]:
            return content(_text(root / "cache", tokenizer))

        with told(seed, f"{'bytes' if tokenizer is None else 'tokens'}, {words}"):
            check_reading(again, _is(expected), root / "cache", [path.name])


def content(data: SequenceDataModule) -> dict[str, Any]:
    """What a data module provides: a hash of all sequences, and what a model takes from it."""
    data.prepare_data()
    data.setup("fit")
    digest = hashlib.sha256()
    for windows in (data.train_set, data.val_set):
        for item in (windows[i] for i in range(len(windows))):
            for name in sorted(item):
                digest.update(name.encode() + item[name].numpy().tobytes())
    sizes = {name: getattr(data, name) for name in ("vocab_size", "sequence_length", "bytes_per_token")}
    return sizes | {"sequences": digest.hexdigest(), "encoded": data.tokenizer.encode("a document of things")}


@cache
def _text_content(tokenizer: str | None) -> dict[str, Any]:
    with new_folder() as root:
        return content(_text(root / "cache", tokenizer))


def _prepared(folder: Path) -> PreparedDataModule:
    return PreparedDataModule(str(folder), _LENGTH, val_fraction=0.2, batch_size=2)


def _text(cache_dir: Path, tokenizer: str | None) -> TextDataModule:
    path = str(source() / "plain.txt")
    return TextDataModule(path, _LENGTH, 0.2, batch_size=2, cache_dir=str(cache_dir), tokenizer=tokenizer)


def _is(expected: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A check that content is as expected."""

    def right(found: dict[str, Any]) -> None:
        differ = [name for name in expected if found[name] != expected[name]]
        assert not differ, f"changed content is accepted: {', '.join(differ)}"

    return right


def _small_tokenizer(rng: random.Random) -> dict[str, Any]:
    """The content of a small `tokenizer.json` of one of several kinds."""
    vocabulary = {"a": 0, "b": 1, "ab": 2, "[UNK]": 3}
    model = rng.choice((
        {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": "[UNK]"},
        {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
        {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        {"type": "Unigram", "vocab": [["[UNK]", 0.0], ["a", -1.0], ["b", -2.0]], "unk_id": 0},
    ))  # fmt: skip
    normalizer = rng.choice((None, {"type": "NFC"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
                             {"type": "Precompiled", "precompiled_charsmap": "AAAA"}))  # fmt: skip
    pre = rng.choice((None, {"type": "Whitespace"}, {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first",
                                                     "split": True}))  # fmt: skip
    added = {"id": 4, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": rng.choice(([], [added])),
        "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
