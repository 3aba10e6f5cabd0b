"""Documents in rows: parquet files, and folders saved by the `datasets` library."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from prepared_folders import DOCUMENTS, content, read_back
from pyarrow import parquet
from tokenizers import Tokenizer

from dma_lightning import TextDataModule
from dma_lightning.cli import main
from dma_lightning.cli import prepare as prepare_command
from dma_lightning.cli.prepare import prepare
from dma_lightning.cli.train_tokenizer import train_tokenizer
from dma_lightning.data import row_formats
from dma_lightning.data.find_files import text_files
from dma_lightning.data.manifests import read_manifest, read_records
from dma_lightning.data.text_formats import read_documents

EXPECTED = [text.encode() for text in DOCUMENTS]


def write_parquet(path: Path, texts: list[str] | pa.Array = DOCUMENTS, **options: int) -> Path:
    """Write a file with another column besides the text."""
    parquet.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return path


def write_dataset(folder: Path, texts: list[str] = DOCUMENTS, files: int = 3) -> Path:
    """Write a saved dataset in several files."""
    data = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    data.save_to_disk(str(folder), num_shards=files)
    return folder


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_formats, "_ROWS", 4)


KINDS: dict[str, Callable[[Path], Path]] = {
    "parquet": lambda folder: write_parquet(folder / "a.parquet", row_group_size=7),
    "dataset": lambda folder: write_dataset(folder / "a"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["itself", "the folder around", "a glob"])
def test_each_row_is_a_document(kind: str, given: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = KINDS[kind](tmp_path / "in")
    named = {"itself": path, "the folder around": path.parent, "a glob": path.parent / "**" / "*"}[given]
    prepare(str(named), tmp_path / "out", shard_tokens=700, processes=1)
    assert read_back(tmp_path / "out") == EXPECTED
    assert len(read_manifest(tmp_path / "out").shards) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [0, 1, 6, 7, 8, 20, 59, 60, 61])
def test_rows_can_be_skipped(kind: str, skip: int, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    pieces = list(read_documents(path, "text", skip))
    assert [piece.text for piece in pieces] == DOCUMENTS[skip:]
    assert [piece.next_line for piece in pieces] == list(range(skip + 1, 61))
    read = [piece.read for piece in pieces]
    assert read == sorted(read)
    assert not read or read[-1] == sum(size for _, size, _ in prepare_command._state([path]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_continues_within_a_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = KINDS[kind](tmp_path)
    prepare(str(path), tmp_path / "whole", shard_tokens=500, processes=1)
    monkeypatch.setattr(prepare_command, "_TASK_BYTES", 50)
    monkeypatch.setattr(prepare_command, "_TASKS_AHEAD", 2)
    with monkeypatch.context() as patched:
        checked = row_formats._checked

        def failing(path: Path, number: int, text: bytes | None) -> bytes:
            return checked(path, number, text if number < 45 else None)

        patched.setattr(row_formats, "_checked", failing)
        with pytest.raises(ValueError, match="row 45: expected a string, got null"):
            prepare(str(path), tmp_path / "out", shard_tokens=500, processes=1)
    kept = read_records(tmp_path / "out")
    assert len(kept) > 1
    assert 0 < kept[-1].next_line < 45
    prepare(str(path), tmp_path / "out", shard_tokens=500, processes=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_rows_stand_beside_other_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in/b", ["b1", "b2"], files=1)
    write_parquet(tmp_path / "in/a.parquet", ["a1", "", "a2"])
    (tmp_path / "in/c.jsonl").write_text(json.dumps({"text": "c"}))
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["d"]})})
    data.save_to_disk(str(tmp_path / "in/d"))
    prepare(str(tmp_path / "in"), tmp_path / "out", processes=1)
    assert read_back(tmp_path / "out") == [b"a1", b"a2", b"b1", b"b2", b"c", b"d"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_string_column_is_text(kind: pa.DataType, tmp_path: Path) -> None:
    texts = pa.array(["Größe 𝄞", "a", "Größe 𝄞"]).cast(kind)
    path = write_parquet(tmp_path / "a.parquet", texts)
    assert parquet.read_schema(path).field("text").type == kind
    assert [piece.text for piece in read_documents(path, "text")] == ["Größe 𝄞", "a", "Größe 𝄞"]


def test_a_selected_and_formatted_dataset_is_read_as_it_was_saved(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"n": [0, 1, 2, 3], "text": list("abcd")}).select([3, 1]).with_format("numpy")
    data.save_to_disk(str(tmp_path / "in"))
    assert [piece.text for piece in read_documents(tmp_path / "in", "text")] == ["d", "b"]


def test_a_tokenizer_is_trained_on_rows(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in/b")
    write_parquet(tmp_path / "in/a.parquet")
    train_tokenizer(str(tmp_path / "in"), 300, tmp_path / "t.json")
    assert "document" in Tokenizer.from_file(str(tmp_path / "t.json")).get_vocab()


def test_a_split_must_be_chosen(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "in"))
    with pytest.raises(ValueError, match=r"/in: expected a dataset with one split, got train, test; .* as .*/in/train"):
        prepare(str(tmp_path / "in"), tmp_path / "out", processes=1)
    prepare(str(tmp_path / "in/train"), tmp_path / "out", processes=1)
    assert read_back(tmp_path / "out") == [b"a"]
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["../in/train"]}')
    with pytest.raises(
        ValueError, match=r"dataset_dict\.json: expected the name of a saved split, got '\.\./in/train'"
    ):
        prepare(str(tmp_path / "in"), tmp_path / "other", processes=1)


@pytest.mark.parametrize(("kind", "name"), [("parquet", "pyarrow"), ("dataset", "datasets")])
def test_a_missing_library_is_named(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = KINDS[kind](tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sys.argv", ["dma-lightning", "prepare", str(path), str(tmp_path / "out"), "--processes=1"])
    with pytest.raises(SystemExit, match=f"prepare: {path}: expected the library {name} for .*; pip install {name}$"):
        main()


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_text_is_told(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    for name in ("id", "body"):
        message = rf"expected a column '{name}' of strings, got the columns {{'id': 'int64', 'text': .*}}; name another"
        with pytest.raises(ValueError, match=message):
            prepare(str(path), tmp_path / "out", text_field=name, processes=1)


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="expected a column 'text' of strings, got"):
        list(read_documents(tmp_path / "a.parquet", "text"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_text_is_told(kind: str, tmp_path: Path) -> None:
    texts = ["a"] * 9 + [None]
    path = write_parquet(tmp_path / "a.parquet", texts) if kind == "parquet" else write_dataset(tmp_path / "a", texts)
    with pytest.raises(ValueError, match=f"{path}, row 10: expected a string, got null"):
        list(read_documents(path, "text"))


def test_text_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"thr\xe9e"], pa.binary())
    path = write_parquet(tmp_path / "a.parquet", pa.Array.from_buffers(pa.string(), 2, raw.buffers()))
    with pytest.raises(ValueError, match=f"{path}, row 2: expected UTF-8: .* 0xe9"):
        list(read_documents(path, "text"))


@pytest.mark.parametrize("cut", [1, 100, 0.5, 3])
def test_a_damaged_file_is_told(cut: float, tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "a.parquet").read_bytes()
    size = round(len(data) * cut) if cut < 1 else len(data) - int(cut)
    (tmp_path / "a.parquet").write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"a\.parquet: expected a whole \.parquet file: "):
        list(read_documents(tmp_path / "a.parquet", "text"))


def test_flipped_bytes_give_text_or_an_error(tmp_path: Path) -> None:
    """Wherever they are; nothing else is raised."""
    data = write_parquet(tmp_path / "a.parquet", ["a", "b" * 50], compression="none").read_bytes()
    random, told = np.random.default_rng(0), []
    for position in random.choice(len(data), 200, replace=False):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            assert all(isinstance(piece.text, str) for piece in read_documents(tmp_path / "a.parquet", "text"))
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 20
    assert all("a.parquet" in message for message in told)


def test_a_damaged_dataset_is_told(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", files=1)
    (file,) = folder.glob("*.arrow")
    state = json.loads((folder / "state.json").read_text())
    for name, message in (
        ("../a/b.arrow", r"state\.json: expected names of files in its folder, got '\.\./a/b\.arrow'; save it again"),
        ("b.arrow", r"b\.arrow: expected a file of the dataset, got no such file"),
    ):
        (folder / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        with pytest.raises(ValueError, match=message):
            prepare(str(folder), tmp_path / "out", processes=1)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json: expected what `Dataset\.save_to_disk` wrote: .* `_data_files`"):
        prepare(str(folder), tmp_path / "out", processes=1)
    (folder / "state.json").write_text(json.dumps(state))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"/a: expected what `Dataset\.save_to_disk` wrote: "):
        prepare(str(folder), tmp_path / "out", processes=1)


def test_a_dataset_that_changed_is_not_continued(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a")
    prepare(str(folder), tmp_path / "out", processes=1)
    (folder / "cache-1.arrow").write_text("of the library, which writes such files beside a dataset")
    prepare(str(folder), tmp_path / "out", processes=1)
    write_dataset(tmp_path / "a", DOCUMENTS[1:])
    with pytest.raises(ValueError, match=r"got other files \(first .*/a\); name another folder"):
        prepare(str(folder), tmp_path / "out", processes=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.arrow", r"expected text, got \.arrow; name the folder that `Dataset\.save_to_disk` wrote"),
        ("a.parquet.gz", r"expected \.parquet, which is compressed in itself, got \.gz; unpack it"),
    ],
)
def test_what_is_no_file_of_rows_is_told(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / name), tmp_path / "out", processes=1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_no_plain_text(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = KINDS[kind](tmp_path / "in")
    data = TextDataModule(str(path.parent), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"expected plain text, got {path}; `dma-lightning prepare` reads"):
        data.prepare_data()


def test_a_large_column_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of several pieces, and others after it."""
    monkeypatch.setattr("dma_lightning.data.text_formats._PIECE", 100)
    monkeypatch.setattr("dma_lightning.data.text_formats._CHUNK", 64)
    texts = ["é𝄞 words and\nlines " * 50, "a", "b"]
    prepare(str(write_parquet(tmp_path / "a.parquet", texts)), tmp_path / "out", processes=1)
    assert read_back(tmp_path / "out") == [text.encode() for text in texts]
    assert len(list(read_documents(tmp_path / "a.parquet", "text"))) > 10


def test_a_glob_takes_files_once(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "in/a")
    assert text_files(str(tmp_path / "**")) == [folder]
