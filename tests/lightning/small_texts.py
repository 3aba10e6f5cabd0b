"""Small texts as data, and tokenizers for them."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dma_lightning import TextDataModule


def make_data(tmp_path: Path, path: Path | str | None, **changed: object) -> TextDataModule:
    """A data module with its own cache."""
    arguments = {"sequence_length": 10, "val_fraction": 0.2, "batch_size": 3} | changed
    return TextDataModule(None if path is None else str(path), cache_dir=str(tmp_path / "cache"), **arguments)


def read(data: TextDataModule) -> tuple[bytes, bytes]:
    """Training and validation text, as read from the data sets."""
    data.prepare_data()
    data.setup("fit")
    parts = []
    for dataset in (data.train_set, data.val_set):
        items = [dataset[i] for i in range(len(dataset))]
        for item in items:
            assert torch.equal(item["input_ids"][1:], item["labels"][:-1])
        parts.append(b"".join(bytes(item["input_ids"].tolist()) for item in items))
    return parts[0], parts[1]


def write_tokenizer(path: Path, vocab_size: int = 300) -> None:
    """Write a byte-level BPE tokenizer trained on the help topics."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    tokenizer.save(str(path))


def special_tokenizer(path: Path) -> str:
    """A tokenizer with bytes as tokens, except white space, which has none, and with a special token."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "<": 2, "end": 3, ">": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path))
    return str(path)
