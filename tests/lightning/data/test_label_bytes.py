"""How many bytes of the source text the labels of each sequence stand for, compared with the text itself.

N sequence length.
"""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_texts import make_data, write_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader

from dma_lightning import PreparedDataModule
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import IGNORE_INDEX, SequenceDataModule, arrays
from dma_lightning.data.manifests import read_manifest
from dma_lightning.data.samplers import PaddedDataset

WORDS = ["the", "Größe", "sixtyfour", ",", "\t", "  ", "\n", "É", "\n \n"]
EOS = 1


def write_word_pieces(path: Path) -> None:
    """Write a tokenizer that drops white space and turns each unknown word into one token."""
    letters = sorted(set("".join(WORDS).lower()) - set("\t\n "))
    vocabulary = {x: i for i, x in enumerate(["[UNK]", "[SEP]", "six", "the", *letters, *(f"##{x}" for x in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=50))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(path))


def write_documents(path: Path, seed: int, blob: int = 0) -> list[str]:
    """Write documents with white space everywhere. One contains a word of the given length."""
    rng = random.Random(seed)
    documents = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 40))) + " the\n\n" for _ in range(40)]
    documents[30] += " " + "z" * blob + " the " if blob else ""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return documents


def lengths_of(text: str, tokens: list[str]) -> list[int]:
    """The bytes of each token in a document, found by searching the text for one token after another."""
    lengths, done = [], 0
    for token in tokens:
        start = next(i for i in range(done, len(text)) if not text[i].isspace())
        spelled = text[start:].split()[0] if token == "[UNK]" else token.removeprefix("##")
        assert text[start : start + len(spelled)].lower() == spelled
        end = start + len(spelled)
        lengths.append(len(text[done:end].encode()))
        done = end
    return lengths


def check(data: SequenceDataModule, lengths: list[np.ndarray], num_workers: int = 0) -> None:
    """Check every window of every split and loader: the bytes of its labels are those of the labels' tokens.

    Args:
        data: set up.
        lengths: bytes of each token, of the training and validation parts' whole shards.
        num_workers: of the loader.
    """
    for dataset, known in zip((data.train_set, data.val_set), lengths, strict=True):
        assert len(dataset) > 3
        expected = []
        for index in range(len(dataset)):
            number = int(np.searchsorted(dataset.first, index, side="right")) - 1
            shard = dataset.shards[number]
            first = shard.start + (index - dataset.first[number]) * dataset.sequence_length + 1
            mine = known[number][first : first + dataset.sequence_length]
            item = dataset[index]
            expected.append(int(mine[item["labels"].numpy() != IGNORE_INDEX].sum()))
            assert item["label_bytes"].dtype == torch.int64
            assert item["label_bytes"].shape == ()
        loader = DataLoader(dataset, 3, num_workers=num_workers)
        assert [x for batch in loader for x in batch["label_bytes"].tolist()] == expected
        padded = PaddedDataset(dataset, IGNORE_INDEX)[len(dataset)]
        assert padded["label_bytes"] == (padded["labels"] != IGNORE_INDEX).sum() == 0


@pytest.mark.parametrize(("eos", "blob"), [(EOS, 0), (None, 300), (EOS, 70_000)])
def test_prepared_words(eos: int | None, blob: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are read in many pieces, some of white space alone."""
    monkeypatch.setattr("dma_lightning.data.text_formats._PIECE", 8)
    monkeypatch.setattr("dma_lightning.data.text_formats._CHUNK", 1 << 20 if blob else 4)
    monkeypatch.setattr(arrays, "_CHUNK", 7)
    write_word_pieces(tmp_path / "tokenizer.json")
    documents = write_documents(tmp_path / "a.jsonl", 0, blob)
    prepare(
        str(tmp_path / "a.jsonl"), tmp_path / "out", str(tmp_path / "tokenizer.json"),
        eos_token_id=eos, shard_tokens=400, processes=1,
    )  # fmt: skip
    manifest, lengths, left = read_manifest(tmp_path / "out"), [], iter(documents)
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for record in manifest.shards:
        tokens, expected = np.fromfile(tmp_path / f"out/{record.name}.tokens", manifest.dtype), []
        for document in np.split(tokens, np.load(tmp_path / f"out/{record.name}.ends.npy")[:-1]):
            words = [vocabulary.id_to_token(token) for token in document]
            if eos is not None:
                assert words.pop() == "[SEP]"
            expected += lengths_of(next(left), words) + [0] * (eos is not None)
        lengths.append(np.array(expected))
        assert record.lengths_dtype == ("uint8" if max(expected) < 256 else "uint32")
        assert np.fromfile(tmp_path / f"out/{record.name}.lengths", record.lengths_dtype).tolist() == expected
    assert {record.lengths_dtype for record in manifest.shards} == ({"uint8", "uint32"} if blob else {"uint8"})
    assert next(left, None) is None
    for options in ({"val_fraction": 0.3}, {"val_path": str(tmp_path / "out")}):
        for separate in (True, False):
            data = PreparedDataModule(str(tmp_path / "out"), 13, separate, **options)
            data.prepare_data()
            data.setup("fit")
            check(data, [lengths, lengths])
    check(data, [lengths, lengths], num_workers=2)
    assert data.bytes_per_token == manifest.bytes / manifest.tokens


@pytest.mark.parametrize("eos", [EOS, None])
def test_prepared_bytes(eos: int | None, tmp_path: Path) -> None:
    """End tokens stand for none; a byte of the same value within a document for one."""
    documents = [text + "\x01 " for text in write_documents(tmp_path / "a.jsonl", 0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", eos_token_id=eos, shard_tokens=900, processes=1)
    manifest, lengths, left = read_manifest(tmp_path / "out"), [], iter(documents)
    for record in manifest.shards:
        parts = [[1] * len(next(left).encode()) + [0] * (eos is not None) for _ in range(record.documents)]
        lengths.append(np.concatenate(parts))
    assert len(lengths) > 2
    for version in (2, 1):  # whose folders of bytes are the same
        content = json.loads((tmp_path / "out/manifest.json").read_text())
        (tmp_path / "out/manifest.json").write_text(json.dumps(content | {"version": version}))
        for separate in (True, False):
            data = PreparedDataModule(str(tmp_path / "out"), 13, separate, val_fraction=0.3)
            data.setup("fit")
            check(data, [lengths, lengths])
            assert data.bytes_per_token == manifest.bytes / manifest.tokens


def test_text_with_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dma_lightning.data.text_formats._CHUNK", 5)
    write_word_pieces(tmp_path / "tokenizer.json")
    text = " \n".join(write_documents(tmp_path / "a.jsonl", 3)) + " " + "z" * 300 + " the\n  \n , the"
    (tmp_path / "a.txt").write_text(text)
    data = make_data(tmp_path, tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    data.prepare_data()
    data.setup("fit")
    tokens = [data.tokenizer.tokenizer.id_to_token(x) for x in np.fromfile(data._cache.array, data._cache.dtype)]
    lengths = np.array(lengths_of(text, tokens))
    assert lengths.max() > 300
    check(data, [[lengths], [lengths]], num_workers=2)
    assert data.bytes_per_token == len(text.encode() + b"\n") / len(tokens)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    """A byte that is none counts as one, not as the three of the character that is shown in its place."""
    write_tokenizer(tmp_path / "tokenizer.json")
    noise = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(noise)
    for tokenizer in (None, str(tmp_path / "tokenizer.json")):
        data = make_data(tmp_path, tmp_path / "a.txt", sequence_length=1, tokenizer=tokenizer)
        data.prepare_data()
        data.setup("fit")
        parts = data.train_set.shards[0], data.val_set.shards[0]
        none = np.empty(0, np.int64)
        firsts = sum(part.bytes_of(0, 1, none) for part in parts)  # the first token of a part is no label
        total = sum(int(x[i]["label_bytes"]) for x in (data.train_set, data.val_set) for i in range(len(x)))
        assert total + firsts == sum(part.bytes_of(0, len(part.tokens), none) for part in parts) == len(noise + b"\n")


def test_a_token_of_4_gib_is_told() -> None:
    with pytest.raises(ValueError, match="expected tokens of less than 4 GiB of text, got one of 4294967296 bytes"):
        arrays.LengthWriter(io.BytesIO()).add(np.array([1 << 32]), 1 << 32)


def test_older_folders_say_that_they_cannot_tell(tmp_path: Path) -> None:
    write_word_pieces(tmp_path / "tokenizer.json")
    write_documents(tmp_path / "a.jsonl", 0)
    arguments = str(tmp_path / "a.jsonl"), tmp_path / "old", str(tmp_path / "tokenizer.json")
    prepare(*arguments, shard_tokens=100, processes=1)
    prepare(arguments[0], tmp_path / "new", arguments[2], processes=1)
    for name in ("manifest.json", "plan.json"):
        content = json.loads((tmp_path / "old" / name).read_text()) | {"version": 1}
        for shard in content.get("shards", []):
            del shard["lengths_dtype"], shard["lengths_sha256"]
            (tmp_path / f"old/{shard['name']}.lengths").unlink()
            (tmp_path / f"old/{shard['name']}.json").write_text(json.dumps(shard))
        (tmp_path / "old" / name).write_text(json.dumps(content))
    for options in ({"path": "old"}, {"path": "new", "val_path": "old"}, {"path": "old", "val_path": "new"}):
        with pytest.warns(UserWarning, match="bits per byte are not reported") as told:
            data = PreparedDataModule(
                **{name: str(tmp_path / x) for name, x in options.items()}, sequence_length=13, val_fraction=0.3
            )
        assert len(told) == 1
        assert data.bytes_per_token is None
        data.prepare_data()
        data.setup("fit")
        assert ("label_bytes" in data.train_set[0]) == (options["path"] == "new")
    for left in (["manifest.json"], []):
        with pytest.raises(
            ValueError, match=r"plan\.json: expected version 2, got 1; delete the folder or name another"
        ):
            prepare(*arguments, shard_tokens=100, processes=1)
        for name in left:
            (tmp_path / "old" / name).unlink()
    for record in (tmp_path / "old").glob("shard-*.json"):
        record.unlink()
    prepare(*arguments, shard_tokens=100, processes=1)  # nothing was finished
    assert PreparedDataModule(str(tmp_path / "old"), 13).bytes_per_token is not None
