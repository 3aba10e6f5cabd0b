"""Text into shards of tokens: what is read or refused, continuing after `kill -9`, and packing into sequences."""

import contextlib
import gzip
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import tracemalloc
from collections.abc import Iterator
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import zstandard
from cpu_verify import sentence
from prepared_folders import content, read_back, write_corpus
from small_texts import special_tokenizer, write_tokenizer
from torch.utils.data import default_collate

from dma_lightning import LanguageModel, PreparedDataModule, TextDataModule, cli
from dma_lightning.cli import prepare as prepare_command
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import IGNORE_INDEX, shards
from dma_lightning.data.manifests import read_manifest, read_records
from dma_lightning.data.text_formats import Piece, read_documents
from dma_lightning.tokenizers import ByteTokenizer
from dma_lightning.trained_models import tokenizer_of


def test_every_kind_of_file_becomes_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = write_corpus(tmp_path / "text")
    prepare(str(tmp_path / "text"), tmp_path / "out", shard_tokens=700, processes=2)
    assert read_back(tmp_path / "out") == [text.encode() for text in documents]
    printed = capsys.readouterr()
    assert "47 documents" in printed.out
    assert "100%" in printed.err
    manifest = read_manifest(tmp_path / "out")
    assert len(manifest.shards) > 3
    assert all(shard.tokens >= 700 for shard in manifest.shards[:-1])
    for record in read_records(tmp_path / "out"):
        record.verify(tmp_path / "out")


def test_output_is_the_same_for_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "text")
    prepare(str(tmp_path / "text"), tmp_path / "one", shard_tokens=500, processes=1)
    monkeypatch.setattr(prepare_command, "_TASK_BYTES", 50)
    monkeypatch.setattr(prepare_command, "_TASKS_AHEAD", 2)
    prepare(str(tmp_path / "text"), tmp_path / "three", shard_tokens=500, processes=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_a_tokenizer_and_an_end_of_documents(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "text")
    write_tokenizer(tmp_path / "tokenizer.json")
    prepare(str(tmp_path / "text"), tmp_path / "out", str(tmp_path / "tokenizer.json"), eos_token_id=7, processes=1)
    data = PreparedDataModule(str(tmp_path / "out"), 16)
    tokens = np.fromfile(tmp_path / "out/shard-00000.tokens", np.uint16)
    ends = np.load(tmp_path / "out/shard-00000.ends.npy")
    assert (data.vocab_size, tokens[ends - 1].tolist()) == (300, [7] * len(documents))
    for text, start, end in zip(documents, [0, *ends], ends, strict=False):
        assert "".join(data.tokenizer.decode_stream(tokens[start : end - 1].tolist())) == text
    assert data.bytes_per_token == sum(len(text.encode()) for text in documents) / len(tokens)
    assert json.loads(data.state_dict()["tokenizer_json"]) == json.loads((tmp_path / "out/tokenizer.json").read_text())
    prepare(str(tmp_path / "text"), tmp_path / "bytes", processes=1)
    with pytest.raises(ValueError, match="tokenizer: expected the one that the checkpoint was trained with"):
        PreparedDataModule(str(tmp_path / "bytes"), 16).load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="val_path: expected a folder with the tokenizer of"):
        PreparedDataModule(str(tmp_path / "out"), 16, val_path=str(tmp_path / "bytes")).setup("fit")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_huge_document_is_tokenised_piece_by_piece(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dma_lightning.data.text_formats._PIECE", 100)
    monkeypatch.setattr("dma_lightning.data.text_formats._CHUNK", 64)
    text = "é𝄞 words and\nlines " * 500 + "é" * 300
    data = json.dumps({"text": text}).encode() if "json" in name else text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    pieces = list(read_documents(tmp_path / name, "text"))
    assert len(pieces) > 20
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.next_line for piece in pieces[:-1]] == [-1] * (len(pieces) - 1)
    (tmp_path / "after.txt").write_text("after")
    prepare(str(tmp_path / "a*"), tmp_path / "out", shard_tokens=10, processes=1)
    assert sorted(read_back(tmp_path / "out")) == sorted([text.encode(), b"after"])


# The bytes are part of the tests' names, which all test processes must agree on: so gzip must not write the time.
BAD = [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: expected a JSON object"),
    ("a.jsonl", b'{"text": "a"}\n\n[1]\n', r"a\.jsonl, line 3: expected a JSON object, got b'\[1\]"),
    ("a.jsonl", b'{"body": "a", "n": 1}\n', r"line 1: expected a string in the field 'text', got .*'body': 'str', 'n'"),
    ("a.jsonl", b'{"text": null}\n', r"line 1: expected a string in the field 'text', got .*'NoneType'"),
    ("a.jsonl", b'{"text": "\\ud834"}\n', r"line 1: expected text, got half of a character"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: expected UTF-8: .* 0xff"),
    ("a.txt", b"one\ntwo\nthr\xe9e\n", r"a\.txt, line 3: expected UTF-8: .* 0xe9"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz: expected a whole \.gz file"),
    ("a.txt.gz", b"no gzip", r"a\.txt\.gz: expected a whole \.gz file"),
    ("a.txt.zst", b"no zstd", r"a\.txt\.zst: expected a whole \.zst file"),
    ("a.txt.ZST", zstandard.compress(b"text" * 99)[:-3], r"a\.txt\.ZST: expected a whole \.zst file: it ends within"),
    (
        "a.JSON.gz",
        gzip.compress(b'{"text": "a"}\n', mtime=0),
        r"a\.JSON\.gz: expected text or JSONL, got \.json; .* \.jsonl if",
    ),
    ("a.tar", b"text", r"a\.tar: expected text or JSONL, got \.tar; unpack it"),
    ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", r"a\.jsonl, line 1: expected a JSON object: Exceeds"),
    ("a.txt", b"", "expected text, got 1 files without any"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_bad_files_are_told_by_name_and_line(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / name), tmp_path / "out", processes=1)
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    with pytest.raises(ValueError, match=r"no manifest\.json; it is not finished: run the same"):
        PreparedDataModule(str(tmp_path / "out"))


def test_lines_of_long_files_are_counted_over_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dma_lightning.data.text_formats._CHUNK", 64)
    (tmp_path / "a.txt").write_bytes(b"some line\n" * 99 + b"\xff")
    with pytest.raises(ValueError, match="line 100: expected UTF-8"):
        list(read_documents(tmp_path / "a.txt", "text"))


def test_zst_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"expected the library zstandard for \.zst files; pip install zstandard"):
        prepare(str(tmp_path / "*.zst"), tmp_path / "out", processes=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eos_token_id": 256}, "eos_token_id: expected one of the 256 tokens, got 256"),
        ({"shard_tokens": 0}, "shard_tokens and processes of at least 1, got 0"),
        ({"processes": 0}, "shard_tokens and processes of at least 1, got 100000000 and 0"),
        ({"path": "nowhere"}, "path: expected a text file, a folder"),
        ({"tokenizer": "nowhere.json"}, r"nowhere\.json: expected a tokenizer\.json"),
    ],
)
def test_bad_arguments(tmp_path: Path, changed: dict, message: str) -> None:
    write_corpus(tmp_path / "text")
    arguments = {"path": str(tmp_path / "text"), "output": tmp_path / "out", "processes": 1}
    with pytest.raises(ValueError, match=message):
        prepare(**(arguments | changed))
    with pytest.raises(ValueError, match="output: expected a folder outside"):
        prepare(**(arguments | {"output": tmp_path / "text/out"}))


def test_a_process_that_is_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for its memory, by the system."""
    write_corpus(tmp_path / "text")
    monkeypatch.setattr(prepare_command, "_start_worker", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match=r"a tokenizing process was killed, .* lower --processes"):
        prepare(str(tmp_path / "text"), tmp_path / "out", processes=1)
    assert not list((tmp_path / "out").glob("*.tmp"))


def run_and_die(text: Path, out: Path, at: int, tokens: int = 500, **options: str | None) -> None:
    """Prepare, but die the `at`-th time that a file is about to get its final name."""
    replace, count = Path.replace, itertools.count(1)

    def dying(self: Path, target: Path) -> Path:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = dying
    prepare(str(text), out, shard_tokens=tokens, processes=1, **options)


@pytest.mark.parametrize("tokenizer", [None, "tokenizer.json"])
def test_kill_9_at_every_file(tokenizer: str | None, tmp_path: Path) -> None:
    """Finished shards are kept as they are, and the whole is that of an undisturbed run."""
    write_corpus(tmp_path / "text")
    write_tokenizer(tmp_path / "tokenizer.json")
    options = {"tokenizer": tokenizer and str(tmp_path / tokenizer)}
    prepare(str(tmp_path / "text"), tmp_path / "whole", shard_tokens=500, processes=1, **options)
    whole, out = content(tmp_path / "whole"), tmp_path / "out"
    context = multiprocessing.get_context("fork")
    kept: dict[str, int] = {}
    for at in (1, 2, 3, 4, 6, 8, 100):  # plan, tokenizer; then lengths, tokens, ends and record of each shard
        process = context.Process(target=run_and_die, args=(tmp_path / "text", out, at), kwargs=options)
        process.start()
        process.join(60)
        assert process.exitcode == (0 if at == 100 else -signal.SIGKILL)
        records = read_records(out)
        for record in records:
            record.verify(out)
        times = {record.name: (out / f"{record.name}.tokens").stat().st_mtime_ns for record in records}
        assert kept.items() <= times.items()
        kept = times
        assert (out / "manifest.json").exists() == (at == 100)
    assert {name: data for name, data in content(out).items() if not name.endswith(".tmp")} == whole
    prepare(str(tmp_path / "text"), out, shard_tokens=500, processes=1, **options)
    assert kept == {record.name: (out / f"{record.name}.tokens").stat().st_mtime_ns for record in records}


def test_a_bad_line_keeps_the_shards_before_it_but_another_plan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_command, "_TASK_BYTES", 50)
    monkeypatch.setattr(prepare_command, "_TASKS_AHEAD", 2)
    write_corpus(tmp_path / "text")
    (tmp_path / "text/f.md.gz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"f\.md\.gz: expected a whole"):
        prepare(str(tmp_path / "text"), tmp_path / "out", shard_tokens=500, processes=1)
    assert len(read_records(tmp_path / "out")) > 1
    with pytest.raises(ValueError, match="expected the options and files it was started with, got other shard_tokens"):
        prepare(str(tmp_path / "text"), tmp_path / "out", shard_tokens=501, processes=1)
    (tmp_path / "text/f.md.gz").write_bytes(gzip.compress(b"last"))
    lines = (tmp_path / "text/a.jsonl").read_text()
    (tmp_path / "text/a.jsonl").write_text(lines + "\n")  # which shards were made of
    with pytest.raises(ValueError, match=r"got other files \(first .*a\.jsonl\); name another folder"):
        prepare(str(tmp_path / "text"), tmp_path / "out", shard_tokens=500, processes=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine").write_text("kept")
    with pytest.raises(ValueError, match="expected a new or empty folder, or one of this command"):
        prepare(str(tmp_path / "text"), tmp_path / "other", processes=1)
    assert content(tmp_path / "other") == {"mine": b"kept"}


def test_mended_files_behind_the_finished_shards_are_taken(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "text")
    bad = tmp_path / "text/f.md.gz"
    whole = bad.read_bytes()
    bad.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"f\.md\.gz: expected a whole"):
        prepare(str(tmp_path / "text"), tmp_path / "out", shard_tokens=500, processes=1)
    kept = read_records(tmp_path / "out")
    bad.write_bytes(whole)
    prepare(str(tmp_path / "text"), tmp_path / "out", shard_tokens=500, processes=1)
    assert read_records(tmp_path / "out")[: len(kept)] == kept
    assert read_back(tmp_path / "out") == [text.encode() for text in documents]
    (tmp_path / "text/h.txt").write_text("more")
    with pytest.raises(ValueError, match=r"got other files \(first .*h\.txt\)"):  # than the finished whole
        prepare(str(tmp_path / "text"), tmp_path / "out", shard_tokens=500, processes=1)


def test_output_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a document")
    for _ in range(2):
        prepare(str(tmp_path / "text/**/*"), tmp_path / "text/out", processes=1)
        assert read_back(tmp_path / "text/out") == [b"a document"]


def test_links_are_followed_and_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("b")
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("a")
    (text / "link").symlink_to(tmp_path / "elsewhere")
    (text / "loop").symlink_to(text)
    prepare(str(text), tmp_path / "out", processes=1)
    assert read_back(tmp_path / "out") == [b"a", b"b"]
    (text / "lost.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a link that points nowhere: .*lost\.txt"):
        prepare(str(text), tmp_path / "out", processes=1)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    text = '{"text": "é"}\r\n' if name.endswith("jsonl") else "é"
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    prepare(str(tmp_path / name), tmp_path / "out", processes=1)
    assert read_back(tmp_path / "out") == ["é".encode()]


def test_frames_of_any_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    compress = zstandard.ZstdCompressor(compression_params=parameters).compress
    text = "".join(f"{i}\n" for i in range(60_000)).encode()
    (tmp_path / "a.txt.zst").write_bytes(compress(text) + compress(b"") + compress(text))
    prepare(str(tmp_path / "a.txt.zst"), tmp_path / "out", processes=1)
    assert read_back(tmp_path / "out") == [text + text]


def test_shards_of_another_plan_are_not_taken_for_those_of_this(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"t{i}", "body": f"b{i}"}) + "\n" for i in range(9)))
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", shard_tokens=4, processes=1)
    for name in ("shard-00000.json", "manifest.json"):
        (tmp_path / "out" / name).unlink()
    process = multiprocessing.get_context("fork").Process(
        target=run_and_die, args=(tmp_path / "a.jsonl", tmp_path / "out", 5), kwargs={"text_field": "body", "tokens": 4}
    )
    process.start()
    process.join(60)
    assert len(read_records(tmp_path / "out")) == 1
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", text_field="body", shard_tokens=4, processes=1)
    assert read_back(tmp_path / "out") == [f"b{i}".encode() for i in range(9)]


def test_shards_hold_no_file_open(prepared: Path) -> None:
    data = PreparedDataModule(str(prepared), 8, val_fraction=0.2)
    data.setup("fit")

    def descriptors() -> set[int]:
        found = set()
        for number in range(1024):
            with contextlib.suppress(OSError):
                os.fstat(number)
                found.add(number)
        return found

    before = descriptors()
    assert len(data.train_set.shards) > 3
    for i in range(len(data.train_set)):
        data.train_set[i]
    assert descriptors() == before


def test_a_window_of_a_large_shard_reads_no_more(tmp_path: Path) -> None:
    tokens = 1 << 30
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(2 * tokens)  # takes no space on the disk
    tracemalloc.start()
    window = shards.Shard(str(tmp_path / "large.bin"), "", "uint16", 0, tokens).tokens[-10:].copy()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (window.tolist(), window.dtype) == ([0] * 10, np.uint16)
    assert peak < 1 << 20


def test_a_folder_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    prepare("~/a.txt", Path("~/out"), processes=1)
    assert (tmp_path / "out/manifest.json").exists()


def test_a_first_attempt_without_a_shard_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a document"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", text_field="body", processes=1)
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", processes=1)
    assert (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("file", ["shard-00001.tokens", "shard-00001.ends.npy"])
def test_a_damaged_shard_is_found_and_made_anew(file: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    out = tmp_path / "out"
    prepare(str(tmp_path / "text"), out, shard_tokens=500, processes=1)
    whole = content(out)
    data = bytearray(whole[file])
    data[-3] ^= 1
    (out / file).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file}: expected what was written, .* Delete shard-00001\.json and"):
        prepare(str(tmp_path / "text"), out, shard_tokens=500, processes=1)
    (out / "shard-00001.json").unlink()
    (out / "manifest.json").unlink()
    prepare(str(tmp_path / "text"), out, shard_tokens=500, processes=1)
    assert content(out) == whole
    (out / file).write_bytes(whole[file][:-1])
    with pytest.raises(ValueError, match=rf"{file}: expected a file of {len(whole[file])} bytes, got .*; copy the"):
        PreparedDataModule(str(out))
    (out / file).unlink()
    with pytest.raises(ValueError, match=rf"{file}: expected a file of .* bytes, got None"):
        PreparedDataModule(str(out))


def wait_and_finish(text: str, out: Path, begun: EventType, go_on: EventType) -> None:
    """Prepare, but wait before the manifest is written."""
    finish = prepare_command._finish

    def waiting(*arguments: object) -> None:
        begun.set()
        go_on.wait(60)
        finish(*arguments)

    prepare_command._finish = waiting
    prepare(text, out, shard_tokens=500, processes=1)


def test_only_one_process_writes_to_a_folder(tmp_path: Path) -> None:
    """The second names the first, and leaves its files alone."""
    documents = write_corpus(tmp_path / "text")
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()
    arguments = str(tmp_path / "text"), tmp_path / "out"
    first = context.Process(target=wait_and_finish, args=(*arguments, begun, go_on))
    first.start()
    assert begun.wait(60)
    (tmp_path / "out/shard-00099.tokens.tmp").write_text("what the first is at")
    before = content(tmp_path / "out")
    for options in ({}, {"shard_tokens": 500}):
        with pytest.raises(
            ValueError,
            match=rf"/out: expected no other process .* got process {first.pid} on .*; wait until it ends, or",
        ):
            prepare(*arguments, processes=1, **options)
        assert content(tmp_path / "out") == before
    go_on.set()
    first.join(60)
    assert first.exitcode == 0
    assert read_back(tmp_path / "out") == [text.encode() for text in documents]
    prepare(*arguments, shard_tokens=500, processes=1)
    assert not (tmp_path / "out/.lock-holder").exists()


def test_a_text_that_changes_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "text")

    def changing(path: Path, *arguments: object) -> Iterator[Piece]:
        yield from read_documents(path, *arguments)
        (tmp_path / "text/a.jsonl").write_text('{"text": "other"}\n')

    monkeypatch.setattr(prepare_command, "read_documents", changing)
    with pytest.raises(ValueError, match=r"a\.jsonl: expected a file that stays unchanged while it is read, got a new"):
        prepare(str(tmp_path / "text"), tmp_path / "out", processes=1)
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(ValueError, match=r"got other files \(first .*a\.jsonl\); name another folder"):
        prepare(str(tmp_path / "text"), tmp_path / "out", processes=1)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """They are legal, but JSON cannot hold them."""
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.txt"))
    file.write_text("text")
    prepare(str(file), tmp_path / "out", processes=1)
    (tmp_path / "out/manifest.json").unlink()
    prepare(str(file), tmp_path / "out", processes=1)
    assert read_back(tmp_path / "out") == [b"text"]
    assert read_manifest(tmp_path / "out").files[0][0] == f"{tmp_path}/\\xe9.txt"


def test_an_unknown_home_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for path, output in (
        ("~no-such-user/a.txt", tmp_path / "out"),
        (str(tmp_path / "a.txt"), Path("~no-such-user/out")),
    ):
        with pytest.raises(ValueError, match="path: expected a known user behind ~, got '~no-such-user/"):
            prepare(path, output, processes=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with several shards of bytes."""
    folder = tmp_path_factory.mktemp("prepared")
    write_corpus(folder / "text")
    prepare(str(folder / "text"), folder / "out", shard_tokens=700, processes=1)
    return folder / "out"


@pytest.mark.parametrize("length", [1, 7, 63, 111])
@pytest.mark.parametrize("val_fraction", [0.3, None])
def test_windows_are_the_text_with_its_borders(prepared: Path, length: int, val_fraction: float | None) -> None:
    """Against the definition, token by token."""
    options = {"val_path": str(prepared)} if val_fraction is None else {"val_fraction": val_fraction}
    modules = [PreparedDataModule(str(prepared), length, separate_documents=x, **options) for x in (True, False)]
    for module in modules:
        module.setup("fit")
    for part in ("train_set", "val_set"):
        packed, plain = (getattr(module, part) for module in modules)
        windows = iter(range(len(packed)))
        for shard in packed.shards:
            tokens = np.fromfile(shard.tokens_file, np.uint8).astype(np.int64)
            owner = np.searchsorted(np.load(shard.ends_file), np.arange(len(tokens)), side="right")
            for start in range(shard.start, shard.stop - length, length):
                index = next(windows)
                item, mine = packed[index], owner[start : start + length + 1]
                text = torch.from_numpy(tokens[start : start + length + 1])
                assert torch.equal(item["input_ids"], text[:-1])
                assert item["documents"].tolist() == (mine[:-1] - mine[0]).tolist()
                same = torch.from_numpy(mine[1:] == mine[:-1])
                assert torch.equal(item["labels"], text[1:].where(same, torch.tensor(IGNORE_INDEX)))
                assert torch.equal(plain[index]["labels"], text[1:])
                assert set(plain[index]) == {"input_ids", "labels", "label_bytes"}
        assert next(windows, None) is None
        with pytest.raises(IndexError):
            packed[len(packed)]
    if val_fraction is not None:
        train, val = (sum(len(s.tokens) for s in part.shards) for part in (modules[0].train_set, modules[0].val_set))
        assert (train + val, val) == (modules[0].manifest.tokens, pytest.approx(0.3 * (train + val), abs=9))


def test_workers_get_where_the_tokens_are(prepared: Path) -> None:
    """Also those that are spawned: the corpus is not sent to them."""
    data = PreparedDataModule(str(prepared), 8, val_fraction=0.2)
    data.setup("fit")
    item = data.train_set[3]
    sent = pickle.dumps(data.train_set)
    assert len(sent) < 3000
    again = pickle.loads(sent)[3]
    assert all(torch.equal(item[name], again[name]) for name in item)


def test_bits_per_byte_are_those_of_the_validation_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    for name, text in (("train", "the of the is to the " * 99), ("val", "Größe 𝄞 " * 99)):
        (tmp_path / f"{name}.txt").write_text(text)
        prepare(str(tmp_path / f"{name}.txt"), tmp_path / name, str(tmp_path / "tokenizer.json"), processes=1)
    data = PreparedDataModule(str(tmp_path / "train"), 16, val_path=str(tmp_path / "val"))
    val = read_manifest(tmp_path / "val")
    ratio = val.bytes / val.tokens
    assert data.bytes_per_token > 1.2 * ratio
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": data.vocab_size}
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(LanguageModel(**shape, bytes_per_token=data.bytes_per_token), data, verbose=False)
    assert found["val/bits_per_byte"] == pytest.approx(found["val/loss"] / math.log(2) / ratio)


def test_bytes_with_ends_of_documents_are_bytes_for_generate(prepared: Path, tmp_path: Path) -> None:
    prepare(str(prepared.parent / "text"), tmp_path / "out", eos_token_id=0, processes=1)
    data = PreparedDataModule(str(tmp_path / "out"), 16)
    assert data.bytes_per_token < 1
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": data.vocab_size}
    module = LanguageModel(**shape, bytes_per_token=data.bytes_per_token)
    torch.save({}, tmp_path / "a.ckpt")
    assert isinstance(tokenizer_of(module, tmp_path / "a.ckpt"), ByteTokenizer)


def test_too_little_text(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sequence_length = 5000 tokens in the training part .* shards at .*out;"):
        PreparedDataModule(str(prepared), 5000).setup("fit")
    (tmp_path / "short.txt").write_text("short")
    prepare(str(tmp_path / "short.txt"), tmp_path / "short", processes=1)
    with pytest.raises(ValueError, match=r"in the validation part of a shard, got at most 5 in 1 shards at .*short;"):
        PreparedDataModule(str(prepared), 16, val_path=str(tmp_path / "short")).setup("fit")
    with pytest.raises(ValueError, match="val_fraction: expected a share between 0 and 1, got 0"):
        PreparedDataModule(str(prepared), 8, val_fraction=0)


@pytest.mark.parametrize("attention", ["dma", "mha", "swa", "mla", "nsa"])
def test_a_model_sees_each_document_by_itself(prepared: Path, attention: str) -> None:
    """What it says in a document depends on no other, and is what it says of the document alone.

    The latter but for nsa, whose blocks lie on one grid.
    """
    data = PreparedDataModule(str(prepared), 111, batch_size=2, val_fraction=0.3)
    data.setup("fit")
    batch = default_collate([data.train_set[i] for i in (0, 1)])
    assert batch["documents"].max() >= 2
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": data.vocab_size}
    torch.manual_seed(0)
    module = LanguageModel(**shape, keep_window_size=16, attention=attention, backend="torch").double().eval()
    packed = module(batch["input_ids"], batch["documents"])
    for row, documents in enumerate(batch["documents"]):
        for document in documents.unique():
            mine = documents == document
            if attention == "nsa":
                alone = module(batch["input_ids"][row].where(mine, 0)[None], documents[None])[:, mine]
            else:
                alone = module(batch["input_ids"][row, mine][None])
            torch.testing.assert_close(packed[row, mine], alone[0], rtol=0, atol=1e-10)


def test_rates_in_the_pages_are_those_of_the_result_file() -> None:
    root = Path(__file__).parents[3]
    checked = json.loads((root / "benchmarks/results/cpu_verify.json").read_text())
    for kind, page in (("prepared shards", "data"), ("checkpoint", "training"), ("export", "reliability")):
        assert sentence(checked, kind) in (root / f"docs/{page}.md").read_text()


def test_the_command_prepares_and_fit_goes_on_mid_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dma-lightning", "prepare", "text", "out", "--shard_tokens=700", "--processes=1"])
    cli.main()
    assert "47 documents" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["dma-lightning", "prepare", "text", "out", "--processes=1"])
    with pytest.raises(SystemExit, match="dma-lightning prepare: out: expected the options and files"):
        cli.main()
    configs = [
        f"--config={Path(__file__).parents[3] / 'configs' / name}.yaml" for name in ("model/tiny", "data/prepared")
    ]
    small = ["--model.num_hidden_layers=1", "--model.hidden_size=32", "--model.keep_window_size=4"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.limit_val_batches=0"]
    data = ["--data.path=out", "--data.sequence_length=16", "--data.num_workers=0", "--data.val_fraction=0.1"]
    arguments = ["fit", *configs, *small, *trainer, *data, "--model.schedule=constant", "--data.batch_size=5"]
    seen = []

    def note(self: LanguageModel, batch: dict, *_: object) -> None:
        seen.append(batch["input_ids"].tolist())

    monkeypatch.setattr(LanguageModel, "on_train_batch_start", note, raising=False)
    whole = cli.build_cli([*arguments, "--trainer.max_steps=7", "--trainer.default_root_dir=whole"])
    first = seen.copy()
    half = cli.build_cli([*arguments, "--trainer.max_steps=3", "--trainer.default_root_dir=half"])
    half.trainer.save_checkpoint("half.ckpt")
    seen.clear()
    rest = cli.build_cli(
        [*arguments, "--trainer.max_steps=7", "--trainer.default_root_dir=rest", "--ckpt_path=half.ckpt"]
    )
    assert isinstance(rest.datamodule, PreparedDataModule)
    assert isinstance(rest.trainer, pl.Trainer)
    assert seen == first[3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name])


def test_a_document_without_tokens_gets_no_end_token(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("a", " ", "", "a a")))
    tokenizer = special_tokenizer(tmp_path / "t.json")
    prepare(str(tmp_path / "in.jsonl"), tmp_path / "out", tokenizer, eos_token_id=5, processes=1)
    assert np.fromfile(tmp_path / "out/shard-00000.tokens", np.uint8).tolist() == [1, 5, 1, 1, 5]
    assert np.load(tmp_path / "out/shard-00000.ends.npy").tolist() == [2, 5]


@pytest.mark.parametrize(("option", "tokens"), [({}, [1, 2, 3, 4, 1, 1]), ({"special_tokens": "parse"}, [1, 5, 1, 1])])
def test_text_that_spells_a_special_token(option: dict[str, str], tokens: list[int], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("a <end> a a")
    tokenizer = special_tokenizer(tmp_path / "t.json")
    prepare(str(tmp_path / "in"), tmp_path / "out", tokenizer, processes=1, **option)
    assert np.fromfile(tmp_path / "out/shard-00000.tokens", np.uint8).tolist() == tokens
    sizes = {"sequence_length": 1, "val_fraction": 0.5, "tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache")}
    data = TextDataModule(str(tmp_path / "in"), **sizes, **option)
    data.prepare_data()
    data.setup("fit")
    assert np.concatenate([data.train_set.shards[0].tokens, data.val_set.shards[0].tokens]).tolist() == tokens


@pytest.mark.parametrize("special", [True, False])
def test_validation_text_was_prepared_the_same_way(special: bool, tmp_path: Path) -> None:
    """What became of special tokens matters if the tokenizer has some."""
    (tmp_path / "a.txt").write_text("a <end> a a " * 9)
    (special_tokenizer if special else write_tokenizer)(tmp_path / "t.json")
    for name in ("text", "parse"):
        options = {"tokenizer": str(tmp_path / "t.json"), "special_tokens": name, "processes": 1}
        prepare(str(tmp_path / "a.txt"), tmp_path / name, **options)
    for ours, theirs in (("text", "parse"), ("parse", "text")):
        data = PreparedDataModule(str(tmp_path / ours), 4, val_path=str(tmp_path / theirs))
        if special:
            message = f"with special_tokens '{ours}', .* got .* with '{theirs}'; prepare it with --special_tokens"
            with pytest.raises(ValueError, match=message):
                data.setup("fit")
        else:
            data.setup("fit")
        assert data.tokenizer.special_tokens == ours
