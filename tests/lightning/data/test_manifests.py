"""Manifests of prepared folders are checked, errors name file and field, and damaged shards are found before a run."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_texts import write_tokenizer

from dma_lightning import PreparedDataModule
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import arrays
from dma_lightning.data.manifests import read_manifest, read_records


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a tokenizer, and four shards made with them."""
    folder = tmp_path_factory.mktemp("source")
    lines = [json.dumps({"text": f"document {i} é" + " and words" * (i % 5)}) + "\n" for i in range(40)]
    (folder / "a.jsonl").write_text("".join(lines))
    write_tokenizer(folder / "tokenizer.json")
    make(folder, folder / "out")
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """The shards alone."""
    return Path(shutil.copytree(source / "out", tmp_path / "out"))


def make(source: Path, out: Path) -> None:
    prepare(str(source / "a.jsonl"), out, str(source / "tokenizer.json"), shard_tokens=150, processes=1)


def use(folder: Path) -> None:
    data = PreparedDataModule(str(folder), 16, val_fraction=0.3)
    data.prepare_data()
    data.setup("fit")
    for i in range(len(data.train_set)):
        data.train_set[i]


def change(file: Path, place: list[str | int], value: object) -> None:
    """Set a field, or remove it if no value is given."""
    content = json.loads(file.read_text())
    target = content
    for name in place[:-1]:
        target = target[name]
    if value is ...:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    file.write_text(json.dumps(content))


MANIFEST = [
    (["version"], 3, "expected version 1 or 2, got 3; prepare the text again"),
    (["version"], "2", "Expected `int`, got `str` - at `$.version`"),
    (["dtype"], ..., "missing required field `dtype`"),
    (["dtype"], "object", "Invalid enum value 'object' - at `$.dtype`"),
    (["dtype"], "uint32", "dtype: expected uint16 for 300 tokens, got uint32"),
    (["shards"], ..., "missing required field `shards`"),
    (["shards"], [], "tokens: expected the sum of the shards, 0, got"),
    (["shards", 1, "name"], "../../shard-00001", "shards[1].name: expected shard-00001, got '../../shard-00001'"),
    (["shards", 1, "name"], "shard-00000", "shards[1].name: expected shard-00001, got 'shard-00000'"),
    (["shards", 1, "tokens"], 0, "Expected `int` >= 1 - at `$.shards[1].tokens`"),
    (["shards", 1, "tokens"], 2**70, "tokens: expected the sum of the shards, 11805916"),
    (["shards", 1, "tokens_sha256"], "x", "matching regex '^[0-9a-f]{64}$' - at `$.shards[1].tokens_sha256`"),
    (["shards", 1, "lengths_dtype"], "float64", "Invalid enum value 'float64' - at `$.shards[1].lengths_dtype`"),
    (["shards", 1, "lengths_dtype"], None, "lengths_dtype and lengths_sha256: expected both or neither"),
    (["tokens"], 1, "tokens: expected the sum of the shards, "),
    (["bytes"], -1, "Expected `int` >= 0 - at `$.bytes`"),
    (["vocab_size"], None, "Expected `int`, got `null` - at `$.vocab_size`"),
    (["vocab_size"], 2**62, "Expected `int` <= 4294967296 - at `$.vocab_size`"),
    (["tokenizer_sha256"], None, "vocab_size: expected 256 for tokens that are bytes, got 300"),
    (["eos_token_id"], 300, "eos_token_id: expected one of 300 tokens, got 300"),
    (["files", 0], ["a", "1", 2], "Expected `int`, got `str` - at `$.files[0][1]`"),
]


@pytest.mark.parametrize(("place", "value", "message"), MANIFEST)
def test_a_manifest_is_refused_with_its_field(place: list, value: object, message: str, folder: Path) -> None:
    change(folder / "manifest.json", place, value)
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        use(folder)
    assert str(told.value).startswith(f"{folder}/manifest.json: expected ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"version": 2, "shards": NaN}', "[" * 100_000, "\xff"])
def test_what_is_no_manifest_is_refused(text: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"/manifest\.json: expected a manifest of `dma-lightning prepare`: "):
        use(folder)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.tokens", "shard-00001.ends.npy", "tokenizer.json"])
@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_read(name: str, kind: Callable, folder: Path) -> None:
    (folder / name).unlink()
    kind(folder / name)
    with pytest.raises(ValueError, match=re.escape(f"{folder / name}: expected ")):
        use(folder)


def write_ends(file: Path, ends: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.save(stream, ends)


ENDS = {
    "one moved behind the next": lambda x: np.concatenate([x[:1] + x[1], x[1:]]),
    "two equal": lambda x: np.concatenate([x[1:2], x[1:]]),
    "one below zero": lambda x: np.concatenate([x[:1] * 0 - 5, x[1:]]),
    "the last behind the tokens": lambda x: np.concatenate([x[:-1], x[-1:] + 1]),
    "the last before the tokens": lambda x: np.concatenate([x[:-1], x[-1:] - 1]),
    "floats": lambda x: x.astype(np.float64),
    "a matrix": lambda x: x[: len(x) // 2 * 2].reshape(2, -1),
}


@pytest.mark.parametrize("damage", ENDS)
def test_ends_are_checked_when_they_are_mapped(damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMA_VERIFY_FILES", "0")
    file = folder / "shard-00001.ends.npy"
    write_ends(file, ENDS[damage](np.load(file)))
    with pytest.raises(ValueError, match=rf"{file}: expected (ends of documents that rise up to|a file of \d+ bytes)"):
        use(folder)


def test_a_header_of_ends_runs_no_parser(tmp_path: Path) -> None:
    """NumPy's own would be misled, or raise errors of Python's parser."""
    write_ends(tmp_path / "ends.npy", np.arange(1, 6))
    whole = (tmp_path / "ends.npy").read_bytes()
    assert arrays.mapped_ends(tmp_path / "ends.npy", 5).tolist() == [1, 2, 3, 4, 5]
    for old, new in ((b"'<i8'", b"'>i8'"), (b"(5,)", b"((5,"), (b"False", b"True "), (b"{", b"("), (b"\x93NUMPY", b"")):
        (tmp_path / "ends.npy").write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=r"ends\.npy: expected ends of documents that rise up to the 5 tokens"):
            arrays.mapped_ends(tmp_path / "ends.npy", 5)


@pytest.mark.parametrize("ending", ["tokens", "ends.npy", "lengths"])
def test_a_flipped_bit_is_found_before_a_run(ending: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / f"shard-00001.{ending}"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for options in ({"path": str(folder)}, {"path": str(folder), "val_path": str(folder)}):
        with pytest.raises(ValueError, match=rf"{file}: expected what was written, .* Delete shard-00001\.json and"):
            PreparedDataModule(**options, sequence_length=16).prepare_data()
    monkeypatch.setenv("DMA_VERIFY_FILES", "0")
    PreparedDataModule(str(folder), 16).prepare_data()
    monkeypatch.setenv("DMA_VERIFY_FILES", "no")
    with pytest.raises(ValueError, match="DMA_VERIFY_FILES: expected 0 or 1, got 'no'"):
        PreparedDataModule(str(folder), 16).prepare_data()


def test_shards_are_read_once_in_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr("dma_lightning.data.manifests.sha256", lambda file: read.append(file) or _sha256(file))
    data = PreparedDataModule(str(folder), 16, val_path=str(folder))
    for _ in range(3):
        data.prepare_data()
    assert sorted(read) == sorted(x for x in folder.iterdir() if x.suffix in (".tokens", ".npy", ".lengths"))


def test_tokens_are_of_the_vocabulary(folder: Path) -> None:
    """Whatever the hashes say."""
    file = folder / "shard-00001.tokens"
    tokens = np.fromfile(file, np.uint16)
    tokens[7] = 300
    tokens.tofile(file)
    change(folder / "manifest.json", ["shards", 1, "tokens_sha256"], _sha256(file))
    with pytest.raises(ValueError, match=rf"{file}: expected tokens below 300, got 300; prepare the text again"):
        use(folder)


def test_lengths_are_within_the_text(folder: Path) -> None:
    file = folder / "shard-00001.lengths"
    lengths = np.fromfile(file, np.uint8)
    lengths[7] += 100
    lengths.tofile(file)
    change(folder / "manifest.json", ["shards", 1, "lengths_sha256"], _sha256(file))
    with pytest.raises(ValueError, match=rf"{file}: expected tokens of at most the \d+ bytes of the text, got \d+;"):
        use(folder)


@pytest.mark.parametrize("eos", [None, 1])
def test_bytes_are_counted_by_tokens_that_are_bytes(eos: int | None, source: Path, tmp_path: Path) -> None:
    prepare(str(source / "a.jsonl"), tmp_path / "out", eos_token_id=eos, processes=1)
    use(tmp_path / "out")
    for place in (["bytes"], ["shards", 0, "bytes"]):
        change(tmp_path / "out/manifest.json", place, 7)
    with pytest.raises(ValueError, match=r"bytes: expected \d+, one for each token but end tokens, got 7"):
        use(tmp_path / "out")


def test_the_tokenizer_is_that_of_the_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    text = file.read_text()
    file.write_text(text + "\n")
    with pytest.raises(ValueError, match=rf"{file}: expected the tokenizer that made the tokens, got another; copy"):
        use(folder)
    write_tokenizer(file, 310)
    with pytest.raises(ValueError, match=rf"{file}: expected 300 tokens, got 310; copy"):
        use(folder)


RECORDS = [
    ("shard-00001.json", ["name"], "shard-00000", "name: expected shard-00001, got 'shard-00000'; delete the file"),
    ("shard-00001.json", ["next_line"], ..., "missing required field `next_line`"),
    ("shard-00001.json", ["tokens"], "1", "Expected `int`, got `str` - at `$.tokens`"),
    ("shard-00001.json", ["next_file"], 9, "next_file: expected at most the 1 files of plan.json, got 9; delete"),
    ("plan.json", ["files"], 5, "Expected `array`, got `int` - at `$.files`"),
    ("plan.json", ["version"], ..., "missing required field `version`"),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), RECORDS)
def test_prepare_tells_what_is_damaged(
    name: str, place: list, value: object, message: str, source: Path, folder: Path
) -> None:
    (folder / "manifest.json").unlink()
    for record in read_records(folder)[2:]:
        (folder / f"{record.name}.json").unlink()
    change(folder / name, place, value)
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        make(source, folder)
    assert str(told.value).startswith(f"{folder / name}: ")


def test_files_with_odd_names_are_left_alone(source: Path, folder: Path) -> None:
    (folder / "manifest.json").unlink()
    odd = ["shard-0x.tokens", "shard-1", "shard-00001-mine.tokens", "shard-00001.txt", "shard-²²²²².tokens"]
    for name in odd:
        (folder / name).write_text("kept")
    (folder / "shard-00009.tokens").write_text("of another plan")
    make(source, folder)
    assert {(folder / name).read_text() for name in odd} == {"kept"}
    assert not (folder / "shard-00009.tokens").exists()
    assert len(read_manifest(folder).shards) > 3


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
