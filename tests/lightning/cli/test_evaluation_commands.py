"""Commands that evaluate a checkpoint: their tables, complete result files, and error messages."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CHECKPOINTS, MODEL, changed, fit
from small_texts import special_tokenizer

from dma_lightning.cli import generate as generate_command
from dma_lightning.cli import main
from dma_lightning.cli import positions as positions_command
from dma_lightning.cli.evaluate import evaluate
from dma_lightning.cli.extrapolation import extrapolation
from dma_lightning.cli.needle import needle
from dma_lightning.cli.positions import positions
from dma_lightning.cli.prepare import prepare
from dma_lightning.evaluation import TrainedRun
from dma_lightning.saved_run import SavedRun

LAST = f"{CHECKPOINTS}/last.ckpt"
NEEDLES = [
    "--data=dma_lightning.NeedleDataModule", "--data.sequence_length=32", "--data.train_examples=100",
    "--data.batch_size=4", "--data.val_examples=33",
]  # fmt: skip


@pytest.fixture(scope="module")
def needles_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that has trained one step on needles."""
    folder = tmp_path_factory.mktemp("needles")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["dma-lightning"])
        fit("--trainer.max_steps=1", *MODEL, *NEEDLES)
    return folder / LAST


@pytest.fixture
def text_run(_small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The last checkpoint in a copy of the small run. The copy is the working folder."""
    subprocess.run(["cp", "-a", f"{_small_run}/.", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    return LAST


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How often each checkpoint is opened."""
    found: Counter = Counter()
    load = torch.load

    def counting(file: Any, *args: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike):
            found[Path(file).suffix] += 1
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", counting)
    return found


def command(*args: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dma-lightning", *map(str, args), "--device=cpu"])
        main()


def test_needles_by_length_and_depth(
    needles_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], openings: Counter
) -> None:
    output = tmp_path / "figures.json"
    command("needle", needles_run, "--depths=[0, 50.5]", "--examples=3", f"--output={output}")
    assert openings[".ckpt"] == 1
    lines, found = capsys.readouterr().out.splitlines(), json.loads(output.read_text())
    assert "| length | 0 % | 50.5 % | mean |" in lines
    lengths = [32, 48, 64, 128, 256]
    assert [row["length"] for row in found["lengths"]] == lengths
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ") and line[2].isdigit()] == 2 * [
        f"| {length}" for length in lengths
    ]
    assert lines[-1].endswith("beyond the training length of 32; by chance 6e-06.")
    assert [(cell["length"], cell["depth"]) for cell in found["cells"][:3]] == [(32, 0), (32, 50.5), (48, 0)]
    assert found.keys() >= {"inside", "beyond", "device", "torch"}
    facts = {"step": 1, "attention": "dma", "training_length": 32, "examples": 3, "dtype": "float32"}
    assert found | facts == found
    assert found["beyond"]["loss"] == pytest.approx(sum(row["loss"] for row in found["lengths"][1:]) / 4)
    assert found["lengths"][0]["cache_bytes"] == found["lengths"][-1]["cache_bytes"] > 0
    assert found["lengths"][0]["peak_memory_bytes"] is None


def test_needles_in_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("mine.txt").write_text("The sun is warm. We walk home and sing a song. " * 20)
    data = ["--data=dma_lightning.TextNeedleDataModule", "--data.sequence_length=256", "--data.batch_size=2"]
    fit("--trainer.max_steps=1", *MODEL, *data)
    command("needle", LAST, "--depths=[0, 100]", "--examples=2", "--lengths=[128, 2048]", "--output=figures.json")
    found = json.loads(Path("figures.json").read_text())
    assert [(row["length"], row["chance"]) for row in found["lengths"]] == [(128, 1e-6), (2048, 1e-6)]
    capsys.readouterr()
    command("needle", LAST, "--depths=[0]", "--examples=2", "--lengths=[128, 900, 2048]", "--path=mine.txt")
    captured = capsys.readouterr()
    assert "| 900 |" in captured.out  # of a text of 940 bytes, all of which is for the evaluation
    assert "length 2,048 is left out: expected at least 2048 bytes of validation text" in captured.err


def test_impossible_lengths_are_told_and_left_out(needles_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("needle", needles_run, "--depths=[0]", "--examples=2", "--lengths=[9, 20]")
    captured = capsys.readouterr()
    assert captured.err == ("length 9 is left out: sequence_length: expected at least 17 for these needles, got 9\n")
    assert "| 20 |" in captured.out


@pytest.mark.parametrize("full", ["true", "false"])
def test_text_at_other_lengths(full: str, text_run: str, capsys: pytest.CaptureFixture[str], openings: Counter) -> None:
    command("extrapolation", text_run, "--examples=5", f"--full_cache={full}", "--output=figures.json")
    assert openings[".ckpt"] == 1
    found = json.loads(Path("figures.json").read_text())
    assert [row["length"] for row in found["lengths"]] == [4, 8, 16, 24, 32, 64, 128]
    assert [row["sequences"] for row in found["lengths"]] == [5, 5, 5, 5, 5, 5, 3]
    for row in found["lengths"]:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / 0.6931472)
        assert row["answers"] is None
    assert "| 16 | 5 | " in capsys.readouterr().out


def test_figures_are_those_of_validation(text_run: str) -> None:
    """At the training length, of as many sequences."""
    command("extrapolation", text_run, "--lengths=[16]", "--output=figures.json")
    (row,) = json.loads(Path("figures.json").read_text())["lengths"]
    run = TrainedRun.open(Path(text_run), "cpu")
    data = run.data()
    data.setup("test")
    items = [data.test_set[i] for i in range(row["sequences"])]
    inputs, labels = (torch.stack([item[name] for item in items]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(run.module(inputs).flatten(0, 1), labels.flatten())
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "lengths"),
    [
        (["--data=dma_lightning.InductionDataModule", "--data.sequence_length=16"], [4, 8, 16, 24, 32, 64, 128]),
        (["--data=dma_lightning.SelectiveCopyDataModule", "--data.sequence_length=64"], [32, 64, 96, 128, 256, 512]),
        (["--data=dma_lightning.MQARDataModule", "--data.sequence_length=32"], [32, 48, 64, 128]),
    ],
)
def test_drawn_tasks_at_other_lengths(
    data: list[str], lengths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit("--trainer.max_steps=1", *MODEL, *data, "--data.batch_size=2", "--data.train_examples=10")
    command("extrapolation", LAST, "--examples=4", "--output=figures.json")
    rows = json.loads(Path("figures.json").read_text())["lengths"]
    assert [row["length"] for row in rows] == lengths
    assert all(row["sequences"] == 4 and 0 <= row["answers"] <= row["accuracy"] for row in rows)


def test_files_that_a_stranger_names_are_not_read(
    text_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    stranger = shutil.copy(text_run, tmp_path / "stranger.ckpt")
    with pytest.raises(SystemExit, match=r"names, got \{'path': 'text.txt'\}; name your own with --path"):
        command("extrapolation", stranger, "--lengths=[8]")
    command("extrapolation", stranger, "--lengths=[8]", "--path=text.txt", "--output=figures.json")
    assert json.loads(Path("figures.json").read_text())["lengths"][0]["sequences"] == 57
    assert list((tmp_path / "other").rglob("*.bin"))


def test_the_text_of_a_user_comes_before_that_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("training", "alpha beta\n"), ("validation", "gamma delta\n"), ("mine", "~!\n")):
        Path(f"{name}.txt").write_text(text * 400)
        prepare(f"{name}.txt", Path(name), processes=1)
    data = ["--data=dma_lightning.PreparedDataModule", "--data.path=training", "--data.val_path=validation"]
    fit("--trainer.max_steps=1", *MODEL, *data, "--data.sequence_length=16", "--data.batch_size=2")
    run = TrainedRun.open(Path(LAST), "cpu")
    read = []
    for path in (None, "mine"):
        module = run.data(path, sequence_length=8)
        module.setup("test")
        read.append(set(bytes(module.test_set[0]["input_ids"].tolist()).decode()))
    assert [{"g"} <= read[0], {"~"} <= read[1]] == [True, True]


def test_loss_by_position(text_run: str, capsys: pytest.CaptureFixture[str], openings: Counter) -> None:
    documents = "".join(json.dumps({"text": "alpha beta gamma " * n}) + "\n" for n in (1, 20, 30))
    Path("held_out.jsonl").write_text(documents)
    command("positions", text_run, "held_out.jsonl", "--length=200", "--output=figures.json")
    assert openings[".ckpt"] == 1
    found = json.loads(Path("figures.json").read_text())
    assert [(row["first"], row["last"]) for row in found["buckets"]] == [(0, 63), (64, 127), (128, 199)]
    assert all(row["documents"] == 2 and row["standard_error"] >= 0 for row in found["buckets"])
    assert f"Mean loss {found['loss']:.4f} nats per token; the training length is 16." in capsys.readouterr().out
    command("positions", text_run, "held_out.jsonl")
    assert "| 0 to 31 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("prepared", [True, False])
def test_special_tokens_of_prompts_and_held_out_text(
    prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt spells special tokens, unless they shall be text; held-out text is read as that of the training was."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a <end> a a " * 400)
    tokenizer = special_tokenizer(Path("t.json"))
    if prepared:
        prepare("text.txt", Path("tokens"), tokenizer, "parse", processes=1)
        data = ["--data=dma_lightning.PreparedDataModule", "--data.path=tokens"]
    else:
        data = ["--data=dma_lightning.TextDataModule", "--data.path=text.txt", "--data.cache_dir=cache"]
        data += [f"--data.tokenizer={tokenizer}", "--data.special_tokens=parse"]
    fit("--trainer.max_steps=1", "--trainer.limit_val_batches=0", *MODEL, *data, "--data.sequence_length=8")
    seen: list[list[int]] = []

    def long_documents(*args: Any) -> list[Any]:
        seen.append(args[1].encode("a <end>"))
        return real_documents(*args)

    def pad_prompts(prompts: list[list[int]], device: str) -> Any:
        seen.append(prompts[0])
        return real_prompts(prompts, device)

    real_documents, real_prompts = positions_command.long_documents, generate_command.pad_prompts
    monkeypatch.setattr(positions_command, "long_documents", long_documents)
    monkeypatch.setattr(generate_command, "pad_prompts", pad_prompts)
    parsed, spelled = [1, 5], [1, 2, 3, 4]
    prompt = ["generate", f"--ckpt_path={LAST}", "--prompt=a <end>", "--max_new_tokens=1"]
    held_out = ["positions", LAST, "text.txt", "--length=16"]
    for args in (prompt, [*prompt, "--special_tokens=text"], held_out, [*held_out, "--special_tokens=text"]):
        command(*args)
    assert seen == [parsed, spelled, parsed, spelled]
    for state in (SavedRun.open(Path(LAST)).content, {}):
        assert SavedRun(Path(LAST), state).special_tokens == ("parse" if state else "text")


def test_weights_in_bfloat16_stay_so(needles_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(needles_run, weights_only=True)
    content["state_dict"] = {name: x.bfloat16() for name, x in content["state_dict"].items()}
    torch.save(content, tmp_path / "half.ckpt")
    output = tmp_path / "figures.json"
    command("needle", tmp_path / "half.ckpt", "--lengths=[32]", "--depths=[0]", "--examples=2", f"--output={output}")
    assert json.loads(output.read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["needle", "RUN"], "expected a checkpoint that was trained on needles, got one on TextDataModule"),
        (["needle", "nowhere.ckpt"], "ckpt_path: expected a checkpoint file, got 'nowhere.ckpt'"),
        (["needle", "NEEDLES", "--path=text.txt"], "path: expected none, since NeedleDataModule reads no such file"),
        (["needle", "NEEDLES", "--lengths=[5]"], r"lengths: expected one that the data can have, got \[5\]: "),
        (["needle", "NEEDLES", "--lengths=[]"], r"lengths: expected at least one, each at least 1, got \[\]"),
        (["needle", "NEEDLES", "--lengths=[0, 32]"], r"lengths: expected at least one, each at least 1, got \[0, 32\]"),
        (["needle", "NEEDLES", "--depths=[-1]"], "depths: expected at least one, each from 0 to 100"),
        (["needle", "NEEDLES", "--output=text.txt"], "output: expected no such file"),
        (["needle", "NEEDLES", "--output=no/such/folder"], "output: expected a file in an existing folder"),
        (["extrapolation", "RUN", "--lengths=[10000]"], "lengths: expected one that the data can have"),
        (["extrapolation", "RUN", "--examples=0"], "expected examples and batch_size >= 1, got 0 and 16"),
        (["extrapolation", "RUN", "--chunk_size=0"], "chunk_size: expected at least 1, got 0"),
        (["extrapolation", "NO DATA"], "trained on data of dma_lightning, got one that names no data"),
        (["extrapolation", "RUN", "--path=nowhere"], "path: expected a text file, a folder"),
        (["positions", "RUN", "nowhere"], "path: expected a text file, a folder"),
        (
            ["positions", "RUN", "text.txt", "--length=4600"],
            "at least length . 1 = 4601 tokens, got 4600 in the longest",
        ),
        (["positions", "RUN", "text.txt", "--length=0"], "length: expected at least 1, got 0"),
        (["positions", "NEEDLES", "text.txt"], "expected a model of text"),
    ],
)
def test_what_cannot_be_is_told(args: list[str], message: str, text_run: str, needles_run: Path) -> None:
    if "NO DATA" in args:
        changed(lambda content: content.pop("datamodule_hyper_parameters"), "no_data.ckpt")
    names = {"RUN": text_run, "NEEDLES": str(needles_run), "NO DATA": "no_data.ckpt"}
    text = Path("text.txt").read_text()
    with pytest.raises(SystemExit, match=message):
        command(*(names.get(arg, arg) for arg in args))
    assert Path("text.txt").read_text() == text


@pytest.mark.parametrize("command_name", ["needle", "extrapolation"])
def test_data_with_more_tokens_than_the_model_is_told(command_name: str, needles_run: Path, tmp_path: Path) -> None:
    content = torch.load(needles_run, weights_only=True)
    content["datamodule_hyper_parameters"]["value_symbols"] += 100
    torch.save(content, tmp_path / "more.ckpt")
    with pytest.raises(SystemExit, match=r"at most the 256 tokens of the model \(vocab_size\), got 356; give"):
        command(command_name, tmp_path / "more.ckpt", "--lengths=[32]", "--examples=1")


@pytest.mark.parametrize("args", [["needle", LAST], ["extrapolation", LAST], ["positions", LAST, "text.txt"]])
def test_devices_that_are_not_there_are_told(args: list[str], text_run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dma-lightning", *args, "--device=abacus"])
    with pytest.raises(SystemExit, match="device: expected one of this machine, got 'abacus'"):
        main()


def test_without_the_harness_its_extra_is_named(text_run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dma_lightning.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"got none or an older one .*; pip install 'dma-lightning\[eval\]'$"):
        command("evaluate", f"--ckpt_path={text_run}", "--tasks=arc_easy")


def test_the_page_names_every_field_and_no_other_option(needles_run: Path, text_run: str) -> None:
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text()
    examples = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("    dma-lightning")]
    assert [example[0] for example in examples] == ["needle", "extrapolation", "positions", "evaluate"]
    runs = {"needle": [needles_run], "extrapolation": [text_run], "positions": [text_run, "text.txt"]}
    for name, *_, output in examples[:3]:  # tests/lightning/evaluation/test_harness.py runs the last
        options = {"needle": ["--depths=[0]", "--examples=1"], "extrapolation": ["--examples=1"]}.get(name, [])
        command(name, *runs[name], *options, f"--output={output}")
        found = json.loads(Path(output).read_text())
        rows = [row for value in found.values() if isinstance(value, list) for row in value]
        assert rows
        fields = set(found).union(*rows, *(value for value in found.values() if isinstance(value, dict)))
        assert [field for field in fields if f"`{field}`" not in page] == []
    functions = (needle, extrapolation, positions, evaluate)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    assert set(re.findall(r"--(\w+)", page)) <= known
