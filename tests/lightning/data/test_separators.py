"""Several documents in one plain text file, with a separator between them."""

import gzip
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prepared_folders import content, read_back
from tokenizers import Tokenizer

from dma_lightning.cli import main
from dma_lightning.cli import prepare as prepare_command
from dma_lightning.cli.prepare import prepare
from dma_lightning.cli.train_tokenizer import train_tokenizer
from dma_lightning.data.manifests import PLAN, read_manifest, read_records
from dma_lightning.data.separators import separated
from dma_lightning.data.text_formats import Piece, read_documents
from dma_lightning.evaluation.positions import long_documents
from dma_lightning.tokenizers import ByteTokenizer

END = "<|endoftext|>"
DOCUMENTS = [f"document {i}: " + "Größe 𝄞 " * (i % 7) + "\nend" for i in range(40)]


@pytest.mark.parametrize("separator", [b"a", b"aa", b"aba", b"ab\n", b"baab"])
def test_documents_are_those_of_split(separator: bytes) -> None:
    """Wherever the chunks end, and if separators could overlap."""
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 300):
        for length in (0, 1, 63, 111, 257):
            text = bytes(random.choice(list(b"aab\n"), length).astype(np.uint8))
            chunks = [text[i : i + size] for i in range(0, length, size)]
            assert [b"".join(parts) for parts in separated(chunks, separator)] == text.split(separator)


def write(folder: Path) -> list[str]:
    """Write two files of separated documents, one compressed, and a JSONL file whose text contains the separator."""
    folder.mkdir()
    (folder / "a.txt").write_text(END.join(["", *DOCUMENTS[:25], "", DOCUMENTS[25]]))
    (folder / "b.txt.gz").write_bytes(gzip.compress((END.join(DOCUMENTS[26:]) + END).encode()))
    (folder / "c.jsonl").write_text(json.dumps({"text": f"in {END} JSONL"}))
    return [*DOCUMENTS, f"in {END} JSONL"]


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_separated_documents(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dma_lightning.data.text_formats._CHUNK", chunk)
    documents = write(tmp_path / "in")
    prepare(str(tmp_path / "in"), tmp_path / "out", separator=END, shard_tokens=700, processes=1)
    assert read_back(tmp_path / "out") == [text.encode() for text in documents]
    assert read_manifest(tmp_path / "out").separator == END


@pytest.mark.parametrize("skip", [0, 1, 2, 26, 27, 28])
def test_documents_can_be_skipped(skip: int, tmp_path: Path) -> None:
    write(tmp_path / "in")
    numbers = [*range(2, 27), 28]  # the first document and the 27th are empty
    pieces = list(read_documents(tmp_path / "in/a.txt", "text", skip, END))
    ends = [piece.next_line for piece in pieces if piece.next_line != -1]
    assert ends == [number for number in numbers if number > skip]
    texts = DOCUMENTS[: len(numbers)][len(numbers) - len(ends) :]
    assert "".join(piece.text for piece in pieces) == "".join(texts)


def test_an_interrupted_run_continues_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in")
    options = {"separator": END, "shard_tokens": 300, "processes": 1}
    prepare(str(tmp_path / "in"), tmp_path / "whole", **options)
    monkeypatch.setattr(prepare_command, "_TASK_BYTES", 50)
    monkeypatch.setattr(prepare_command, "_TASKS_AHEAD", 2)

    def failing(path: Path, *arguments: object) -> Iterator[Piece]:
        for number, piece in enumerate(read_documents(path, *arguments)):
            if number == 40:
                raise ValueError("interrupted")
            yield piece

    with monkeypatch.context() as patched:
        patched.setattr(prepare_command, "read_documents", failing)
        with pytest.raises(ValueError, match="interrupted"):
            prepare(str(tmp_path / "in"), tmp_path / "out", **options)
    last = read_records(tmp_path / "out")[-1]
    assert (last.next_file, last.next_line > 1) == (0, True)
    with pytest.raises(ValueError, match="expected the options and files it was started with, got other separator;"):
        prepare(str(tmp_path / "in"), tmp_path / "out", **options | {"separator": "\n"})
    prepare(str(tmp_path / "in"), tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_from_before_separators_is_continued(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", processes=1)
    for name in (PLAN, "manifest.json"):
        old = json.loads((tmp_path / "out" / name).read_text())
        del old["separator"]
        (tmp_path / "out" / name).write_text(json.dumps(old))
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", processes=1)
    assert read_manifest(tmp_path / "out").separator is None


def test_lines_are_counted_over_documents_and_separators(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n---\nfour\n---\nsi\xffx\n")
    for skip in (0, 1, 2):
        with pytest.raises(ValueError, match=r"a\.txt, line 6: expected UTF-8: .* 0xff"):
            list(read_documents(tmp_path / "a.txt", "text", skip, "\n---\n"))


def test_the_flag_takes_its_characters_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a line feed is one that the shell made; what looks like one is told to be none."""
    (tmp_path / "a.txt").write_text("# a\n\n# b\n\nnull")
    arguments = ["dma-lightning", "prepare", str(tmp_path / "a.txt"), "--processes=1"]
    for number, (separator, expected) in enumerate(
        [("\n\n", [b"# a", b"# b", b"null"]), ("# ", [b"a\n\n", b"b\n\nnull"]), ("null", [b"# a\n\n# b\n\n"])]
    ):
        monkeypatch.setattr("sys.argv", [*arguments, str(tmp_path / f"out-{number}"), "--separator", separator])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main()
        assert read_back(tmp_path / f"out-{number}") == expected
    monkeypatch.setattr("sys.argv", [*arguments, str(tmp_path / "out"), "--separator", r"\n\n"])
    with pytest.warns(UserWarning, match=r"between documents, got no more documents than files; in bash, \$'\\n' is a"):
        main()


@pytest.mark.parametrize(
    ("separator", "message"),
    [
        ("", "separator: expected at least one character, got none; without one, each file is a document"),
        ("\udcff", "separator: expected UTF-8, as the text, got '.udcff'"),
        (END, "separator: expected a plain text file, got only lines and rows, each of which is a document; leave"),
    ],
)
def test_a_separator_of_no_use_is_told(separator: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=message):
        prepare(str(path), tmp_path / "out", separator=separator, processes=1)
    with pytest.raises(ValueError, match=message):
        train_tokenizer(str(path), 300, tmp_path / "t.json", separator=separator)


def test_a_tokenizer_does_not_see_separators(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(END.join(["a cat", "a dog"] * 50))
    for separator, seen in ((None, True), (END, False)):
        output = tmp_path / f"{separator is None}.json"
        train_tokenizer(str(tmp_path / "a.txt"), 300, output, separator=separator)
        assert any("endoftext" in token for token in Tokenizer.from_file(str(output)).get_vocab()) == seen


def test_losses_by_position_are_of_separated_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x".join(["a" * 50, "b" * 20, "c" * 40]))
    found = long_documents([tmp_path / "a.txt"], ByteTokenizer(), 30, 10, separator="x")
    assert [document.tokens.tolist() for document in found] == [[ord("a")] * 31, [ord("c")] * 31]
