"""What commands say about mistakes, and what they leave behind."""

import shutil
import sys
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import small_run
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.loggers import CSVLogger

from dma_lightning import LanguageModel
from dma_lightning.cli.entry import main
from dma_lightning.cli.unstarted_runs import UnstartedRuns

CONFIGS = Path(__file__).parents[3] / "configs"
LAYERS = [f"-c={CONFIGS}/{name}.yaml" for name in ("model/tiny", "data/text", "trainer/cpu")]


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with three texts, and configs that contain mistakes."""
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    for name in "abc":
        Path("books", f"{name}.txt").write_text("alpha beta gamma delta\n" * 200)
    Path("key.yaml").write_text("model:\n  hiden_size: 32\n")
    Path("group.yaml").write_text("trainr:\n  max_steps: 3\n")
    Path("argument.yaml").write_text("data:\n  class_path: dma_lightning.TextDataModule\n  init_args:\n    pth: x\n")
    Path("class.yaml").write_text("trainer:\n  callbacks:\n  - class_path: dma_lightning.callbacks.GradientGard\n")
    Path("type.yaml").write_text("model:\n  hidden_size: wide\n")
    prepared = "data: {class_path: dma_lightning.PreparedDataModule, init_args: {path: {a: x}}}"
    Path("weights.yaml").write_text(prepared)
    Path("broken.yaml").write_text("trainer: [\n")


def run(*args: str) -> int:
    """The exit status of a command."""
    with mock.patch.object(sys, "argv", ["dma-lightning", *args]):
        try:
            main()
        except SystemExit as stop:
            if isinstance(stop.code, str):  # as the interpreter does
                print(stop.code, file=sys.stderr)
                return 1
            return int(stop.code or 0)
    return 0


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error. It must be the only one that begins like our messages."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line or "usage:" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("dma-lightning")]
    assert line == lines[-1]
    return line


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--trainer.max_stepz 3", ["--trainer.max_stepz: no such option; did you mean --trainer.max_steps?"]),
        ("--batch_size 3", ["--batch_size: no such option; did you mean --data.batch_size?"]),
        ("--trainer.max_steps soon", ["--trainer.max_steps: expected int, got 'soon'"]),
        ("--trainer.max_steps", ["--trainer.max_steps: expected one argument"]),
        ("--trainer.limit_val_batches few", ["--trainer.limit_val_batches: expected int, float or null, got 'few'"]),
        ("--trainer.precision bf16mixed", ["--trainer.precision: expected one of ", "did you mean 'bf16-mixed'?"]),
        ("--model.schedule wsdd", ["--model.schedule: expected one of 'wsd', 'cosine', ", "did you mean 'wsd'?"]),
        ("--data TextDataModul", ["--data: no such class: TextDataModul; did you mean TextDataModule?"]),
        ("--data.pth x", ["--data.pth: TextDataModule has no such argument; did you mean path?"]),
        ("--data.batch_size many", ["--data.batch_size: expected int, got 'many'"]),
        ("--trainer.callbacks+=GradientGard", ["--trainer.callbacks: no such class", "did you mean GradientGuard?"]),
        (
            "--trainer.callbacks+=dma_lightning.callbacks.MixedWindow",
            ["no such class: dma_lightning.callbacks.MixedWindow; did you mean MixedWindows?"],
        ),
        ("--trainer.callbacks+=my.GradientGuard", ["No module named 'my'", "did you mean GradientGuard?"]),
        ("--every_n_train_steps 9", ["no such option; did you mean --checkpoint.every_n_train_steps?"]),
        ("--checkpoint.evry_n 9", ["--checkpoint.evry_n: ResumableCheckpoint has no such argument"]),
        ("--guard.spike stopp", ["--guard.spike: expected one of 'stop', 'skip', 'ignore'", "did you mean 'stop'?"]),
        ("--trainer.logger Tensorboard", ["no such class: Tensorboard; did you mean TensorBoardLogger?"]),
        ("-c key.yaml", ["key.yaml: model.hiden_size: no such option; did you mean model.hidden_size?"]),
        ("-c group.yaml", ["group.yaml: trainr.max_steps: no such option; did you mean trainer.max_steps?"]),
        ("-c argument.yaml", ["argument.yaml: data.pth: TextDataModule has no such argument; did you mean path?"]),
        ("-c class.yaml", ["class.yaml: trainer.callbacks: no such class", "did you mean GradientGuard?"]),
        ("-c type.yaml", ["type.yaml: model.hidden_size: expected int, got 'wide'"]),
        ("-c weights.yaml", ["weights.yaml: data.path: expected str or dict[str, float], got {'a': 'x'}; see"]),
        ("-c broken.yaml", ["broken.yaml, line 2: expected YAML, got something else: "]),
        ("-c type.yml", ["config, got 'type.yml'; did you mean 'type.yaml'?"]),
        ("-c tinny", ["-c: expected a file or the name of a shipped config, got 'tinny'; did you mean 'model/tiny'?"]),
        ("--data.path books/a.txt books/b.txt books/c.txt", ["books/b.txt and 1 more", "--data.path 'books/*.txt'"]),
        ("books", ["books: expected nothing here; options start with --"]),
    ],
)
def test_wrong_usage(args: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", *LAYERS, *args.split()) == 2
    line = said(capsys)
    assert line.startswith("dma-lightning fit: ")
    assert line.endswith("ee `dma-lightning fit --help`")
    assert [part for part in parts if part not in line] == [], line
    assert list(Path().glob("*runs")) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("prepare books out --proceses 3", "--proceses: no such option; did you mean --processes?"),
        ("prepare books out --special_tokens pars", "got 'pars'; did you mean 'parse'?"),
        ("prepare books", "output: must be given"),
        ("prepare books/a.txt books/b.txt books/c.txt out", "so quote it, as in 'books/*.txt'"),
        ("generate --promt a", "--promt: no such option; did you mean --prompt?"),
        ("generate --prompt a", "--ckpt_path: must be given"),
        ("sizes tiny.yaml --sequence_length long", "--sequence_length: expected int, got 'long'"),
        ("fit", "data: expected a class of data, got none; `dma-lightning fit -c tiny -c pydoc -c cpu` trains a small"),
        ("fit -c tiny", "data: expected a class of data, got none; give a config such as -c data/text, or --data Text"),
        ("validate", "data: expected a class of data, got none; `dma-lightning validate --ckpt_path FILE` uses the"),
        ("validate --ckpt_pth a", "--ckpt_pth: no such option; did you mean --ckpt_path?"),
        ("fti", "got 'fti'; did you mean 'fit'?"),
    ],
)
def test_wrong_usage_of_other_commands(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args.split()) == 2
    line = said(capsys)
    assert message in line
    assert args == "fti" or line.startswith(f"dma-lightning {args.split()[0]}: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--trainer.accelerator=gpuu", "trainer.accelerator: expected one of ['auto', 'cpu', "),
        ("--trainer.accelerator=tpu", "trainer.accelerator: expected what this machine has, "),
        ("--trainer.strategy=dpp", "got 'dpp'; did you mean 'ddp'?"),
        ("--trainer.devices=0", "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
        ("--trainer.gradient_clip_algorithm=nrm", "Allowed algorithms: ['value', 'norm']"),
        ("--trainer.profiler=simpel", "only be one of ['simple', 'advanced', "),
        ("--model.attention=dam", "attention: expected one of ['dma', "),
        (
            "--trainer.check_val_every_n_epoch=1 --trainer.val_check_interval=99999",
            "`val_check_interval` (99999) must be",
        ),
        ("--fit_report.metric=val/los", "metric: expected one of ['val/loss', "),
        ("--data.batch_size=1000000", "lower data.batch_size or give more data"),
        ("--data.path=nowhere.txt", "expected a text file, a folder with files or a glob that matches"),
    ],
)
def test_other_mistakes_leave_nothing(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--data.path=books", "--data.cache_dir=cache", "--data.sequence_length=32", "--data.num_workers=0"]
    few = ["--trainer.num_sanity_val_steps=1", "--trainer.enable_progress_bar=false", *small_run.MODEL]
    assert run("fit", *LAYERS, *sizes, *few, *args.split()) == 1
    line = said(capsys)
    assert line.startswith("dma-lightning fit: ")
    assert message in line
    assert not Path("runs").exists()


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False):
        assert run("fit", *LAYERS, "--trainer.logger=WandbLogger") == 1
    assert "WandbLogger: " in said(capsys)


def test_memory_that_a_gpu_lacks_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    monkeypatch.setattr("dma_lightning.cli.entry.build_cli", fail)
    assert run("fit") == 1
    assert "CUDA out of memory; lower data.batch_size" in said(capsys)


@pytest.mark.parametrize(
    ("args", "kind"), [("--trainer.max_stepz=3", ArgumentError), ("--trainer.strategy=dpp", ValueError)]
)
def test_a_traceback_can_be_had(args: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMA_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(kind):
        run("fit", *LAYERS, args)


@pytest.fixture
def _trained(_small_run: Path, tmp_path: Path) -> None:
    """A copy of the small run, in the working folder."""
    for name in ("runs", "cache", "text.txt"):
        if name == "runs":
            shutil.copytree(_small_run / name, tmp_path / name, symlinks=True)
        else:
            (tmp_path / name).symlink_to(_small_run / name)


def _files() -> dict[str, tuple[int, int]]:
    """Size and modification time of every file and folder of the runs."""
    return {str(x): (x.lstat().st_size, x.lstat().st_mtime_ns) for x in Path("runs").rglob("*")}


@pytest.mark.usefixtures("_trained")
@pytest.mark.parametrize("path", ["last", f"{small_run.CHECKPOINTS}/last.ckpt"])
def test_nothing_to_do_writes_nothing(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files()
    small_run.fit("--trainer.max_steps=3", f"--ckpt_path={path}", *small_run.MODEL, *small_run.DATA)
    assert "nothing to do: 3 of 3 steps are done; raise trainer.max_steps" in capsys.readouterr().out
    assert _files() == before


@pytest.mark.usefixtures("_trained")
def test_a_run_that_fails_to_go_on_keeps_what_was_there() -> None:
    before = {name: size for name, (size, _) in _files().items()}
    wrong = ["--trainer.max_steps=9", "--trainer.val_check_interval=1000000", "--ckpt_path=last"]
    with pytest.raises(ValueError, match="val_check_interval"):
        small_run.fit(*wrong, *small_run.MODEL, *small_run.DATA)
    assert {name: size for name, (size, _) in _files().items()} == before


def test_a_run_that_has_trained_keeps_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    Path("text.txt").write_text("alpha beta gamma delta\n" * 200)
    monkeypatch.setattr(LanguageModel, "validation_step", fail)
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=2"]
    with pytest.raises(OSError, match="the disk is gone"):
        small_run.fit(*steps, *small_run.MODEL, *small_run.DATA)
    assert Path("runs/small/version_0/config.yaml").exists()


@pytest.mark.usefixtures("_trained")
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluation_leaves_no_logs(subcommand: str, tmp_path: Path) -> None:
    few = [f"--trainer.limit_{subcommand.replace('idate', '')}_batches=1", "--trainer.accelerator=cpu"]
    checkpoint = f"--ckpt_path={small_run.CHECKPOINTS}/last.ckpt"
    small_run.cli(subcommand, checkpoint, *few, "--trainer.enable_progress_bar=false", *small_run.DATA)
    made = {x.name for x in tmp_path.iterdir()}
    assert "lightning_logs" not in made
    assert len(list(Path("runs/small").iterdir())) == 1


def test_a_checkpoint_keeps_the_folder_that_it_is_in(tmp_path: Path) -> None:
    """Whatever else has been written, and although no batch was trained on."""
    trainer = pl.Trainer(logger=CSVLogger("runs"), accelerator="cpu", enable_progress_bar=False)
    unstarted, folder = UnstartedRuns(trainer), Path(trainer.logger.log_dir)
    for name in ("config.yaml", "checkpoints/step=1.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    unstarted.clean()
    assert (folder / "config.yaml").exists()
    (folder / "checkpoints/step=1.ckpt").unlink()
    (folder / "notes.txt").touch()
    unstarted.clean()
    assert [x.name for x in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    unstarted.clean()
    assert list(tmp_path.glob("runs")) == []
