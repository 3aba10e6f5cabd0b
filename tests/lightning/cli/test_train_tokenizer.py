"""A tokenizer trained on given text: reproducible, without gaps, and accepted by the other commands."""

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from dma_lightning import FileTokenizer
from dma_lightning.cli import main
from dma_lightning.cli.prepare import prepare
from dma_lightning.cli.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("".join(list(topics.values())[:10]))
    lines = [json.dumps({"text": text}) for text in list(topics.values())[10:20]]
    (folder / "b.jsonl").write_text("\n".join(lines))
    return folder


def test_the_same_text_gives_the_same_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(str(text), 500, tmp_path / "one.json")
    size = sum(len(x.encode()) for x in list(topics.values())[:20])
    assert (
        capsys.readouterr().out == f"{tmp_path}/one.json: 500 tokens, of {size:,} bytes of text; token 0 is <|end|>\n"
    )
    command = [sys.executable, "-m", "dma_lightning", "train-tokenizer", str(text), "--vocab_size=500"]
    subprocess.run([*command, f"--output={tmp_path / 'two.json'}"], check=True)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_every_text_has_tokens_and_comes_back(text: Path, tmp_path: Path) -> None:
    train_tokenizer(str(text), 500, tmp_path / "tokenizer.json")
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json", "text")
    strange = "Größe 𝄞 \x00\t  <|end|> the"
    tokens = tokenizer.encode(strange)
    assert "".join(tokenizer.decode_stream(tokens)) == strange
    assert 0 not in tokens
    assert FileTokenizer(tmp_path / "tokenizer.json", "parse").encode("a<|end|>")[-1] == 0
    assert len(tokenizer.encode(topics["assert"])) < 0.6 * len(topics["assert"])


def test_documents_end_with_its_end_token(text: Path, tmp_path: Path) -> None:
    train_tokenizer(str(text), 300, tmp_path / "tokenizer.json", end_token="[E]")
    prepare(str(text), tmp_path / "out", str(tmp_path / "tokenizer.json"), eos_token_id=0, processes=1)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["vocab_size"], manifest["documents"], manifest["eos_token_id"]) == (300, 11, 0)


def test_a_small_text_says_that_it_has_no_more_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("aaaa")
    train_tokenizer(str(tmp_path / "a.txt"), 1000, tmp_path / "tokenizer.json")
    assert "tokens, because the text yields no more than" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["TEXT", "--vocab_size=256"], "vocab_size: expected at least 257"),
        (["TEXT", "--end_token="], "end_token: expected at least one character"),
        (["TEXT", "--output=THERE"], "output: expected no such file, since nothing is overwritten"),
        (["EMPTY"], "expected text, got 1 files without any"),
        (["nowhere"], "path: expected a text file"),
    ],
)
def test_what_cannot_be_is_told(
    args: list[str], message: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "empty.txt").write_text("")
    names = {"TEXT": str(text), "THERE": str(tmp_path / "there.json"), "EMPTY": str(tmp_path / "empty.txt")}
    for name, value in names.items():
        args = [arg.replace(name, value) for arg in args]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dma-lightning", "train-tokenizer", *args])
    with pytest.raises(SystemExit, match=message):
        main()
    assert (tmp_path / "there.json").read_text() == "mine"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["empty.txt", "there.json"]
