"""The command line: shipped configs build, later configs override earlier ones, and mistakes are reported."""

import re
import subprocess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor

import dma_lightning
from dma_lightning import MQARDataModule
from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.cli.default_callbacks import DEFAULT_CALLBACKS
from dma_lightning.cli.entry import _COMMANDS, DMACLI, build_cli, main
from dma_lightning.cli.prepare import prepare
from dma_lightning.distributed import SameCheckpoint
from dma_lightning.monitoring import ProgressBar

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
# Parameters outside the embedding that the paper's shapes have, without residual weights, A and Δ.
PAPER_SIZES = {"80m": 84.96e6, "200m": 201.4e6, "680m": 679.6e6, "1.7b": 1409e6}


def build(*args: str) -> DMACLI:
    """Trainer, model and data of several configs on top of each other, without running."""
    return build_cli(["--trainer.accelerator=cpu", "--trainer.logger=false", *args], run=False)


def config(name: str) -> str:
    """The argument that adds a shipped config, by its name."""
    return f"--config={name}"


def companions(file: Path) -> list[str]:
    """The arguments that complete one shipped config."""
    data = "mqar" if file.stem.startswith("mqar") else "pydoc"
    args = [f"--config={file}"] + ([config(f"data/{data}")] if file.parent.name != "data" else [])
    if file.stem == "prepared":
        Path("a.txt").write_text("text")
        prepare("a.txt", Path("prepared"), processes=1)
        args.append("--data.path=prepared")
    if file.stem == "chat":
        args += ["--data.path=chat.jsonl", "--data.chat_template=simple"]
    # A config for GPUs is built here too, on the CPU.
    return [*args, "--trainer.accelerator=cpu", "--trainer.devices=1"] if file.parent.name == "trainer" else args


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write to a temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_config_builds(file: Path) -> None:
    others = set(DEFAULT_CALLBACKS) if file.parent.name == "trainer" else set()
    assert file.parent.name in yaml.safe_load(file.read_text()).keys() <= {file.parent.name, *others}
    with torch.device("meta"):
        cli = build_cli(companions(file), run=False)
    assert isinstance(cli.trainer, pl.Trainer)
    assert cli.model.model.config.max_position_embeddings == cli.datamodule.sequence_length
    assert cli.model.model.config.vocab_size == cli.datamodule.vocab_size


def test_runs_have_whole_checkpoints_and_agree_on_them() -> None:
    cli = build_cli([config("model/mqar"), config("data/mqar"), config("trainer/cpu")], run=False)
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert any(isinstance(callback, SameCheckpoint) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("option", ["--optimizer=SGD", "--lr_scheduler=ExponentialLR"])
def test_the_model_alone_says_how_it_is_trained(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build(config("data/mqar"), option)
    assert f"{option.partition('=')[0]}: no such option" in capsys.readouterr().err


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_shapes_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = build(config(f"model/{name}-published"), config("data/pydoc")).model.model
    unlisted = sum(
        p.numel() for key, p in model.named_parameters() if key.endswith(("residual", ".A", "dt_proj.weight"))
    )
    assert model.num_non_embedding_parameters - unlisted == pytest.approx(PAPER_SIZES[name], rel=1e-3)


def test_all_paper_shapes_are_shipped() -> None:
    both = {*PAPER_SIZES, "tiny", "mqar", "5m"}
    expected = {*both, *(f"{name}-published" for name in both), "1m", "20m"}
    assert {f.stem for f in (CONFIGS / "model").iterdir()} == expected


def test_later_configs_and_flags_override() -> None:
    cli = build(config("model/tiny"), config("model/80m"), config("data/pydoc"), "--model.num_hidden_layers=1")
    assert cli.model.model.config.hidden_size == 768
    assert len(cli.model.model.layers) == 1


def test_print_config_shows_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_cli(["fit", config("model/tiny"), config("data/pydoc"), "--model.lr=0.5", "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["lr"] == 0.5
    assert shown["data"]["init_args"]["sequence_length"] == 256


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_help_documents_every_field(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_cli([subcommand, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for option in words[words.index("--model CONFIG") : words.index("--data.help")].split("--model.")[1:]:
        text = option.split("(type:")[0].split(maxsplit=2)
        if text[-1].endswith(","):
            continue  # another form of the same option follows, and then the text
        assert len(text) == 3, f"--model.{option} has no documentation"


@pytest.mark.parametrize("name", ["TextDataModule", "MQARDataModule", "PreparedDataModule"])
def test_help_documents_the_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_cli(["fit", f"--data.help=dma_lightning.{name}"])
    words = " ".join(capsys.readouterr().out.split())
    for option in words.split(" --data.")[1:]:
        text = option.split("(type:")[0].split(maxsplit=2)
        if text[-1].endswith(","):
            continue  # another form of the same option follows, and then the text
        assert len(text) == 3, f"--data.{option} has no documentation"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.keep_windowsize=5"], "model.keep_windowsize"),
        (["--model.lr=fast"], "model.lr"),
        (["--model.backend=flash"], "'auto', 'triton', 'flex', 'torch', 'reference'"),
        (["--data.sequence_len=5"], "sequence_len"),
        (["--data=NoSuchData"], "NoSuchData"),
        (["--trainer.max_step=5"], "trainer.max_step"),
    ],
)
def test_mistakes_on_the_command_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build(config("model/tiny"), config("data/pydoc"), *args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"--ckpt_path: expected an existing checkpoint, got 'no/such\.ckpt'"):
        build_cli(["validate", "--ckpt_path=no/such.ckpt"])


def test_mistyped_key_in_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text("model:\n  hidden_sise: 64\n")
    with pytest.raises(SystemExit):
        build(config("data/pydoc"), f"--config={file}")
    assert "hidden_sise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.lr=-1"], "expected lr > 0"),
        (["--model.warmup_fraction=0.9"], "two shares of at most 1 in all, got 0.9 and 0.2"),
        (["--model.num_key_value_heads=3"], "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (["--model.keep_window_size=0"], "keep_window_size: expected at least 1, got 0"),
        (["--model.betas=[0.9,1.0]"], r"betas: expected two numbers, each at least 0 and below 1, got \(0\.9, 1\.0\)"),
        (["--data.sequence_length=0"], "sequence_length: expected at least 1, got 0"),
    ],
)
def test_values_out_of_range(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config("model/tiny"), config("data/pydoc"), *args)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--model.keep_window_size=0", "keep_window_size: expected at least 1, got 0"),
        ("--data.batch_size=0", "batch_size: expected at least 1, got 0"),  # of which jsonargparse makes ten lines
        ("--data.cache_dir=a_file/cache", "[Errno 20] Not a directory: 'a_file/cache'; make room, or choose a"),
        ("--data.path=/no/such/text", "path: expected a text file, a folder with files or a glob that matches, got "),
    ],
)
def test_mistakes_are_told_in_a_line(arg: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config(name) for name in ("model/tiny", "data/pydoc", "trainer/cpu")]
    Path("a_file").touch()
    monkeypatch.setattr("sys.argv", ["dma-lightning", "fit", *configs, "--trainer.logger=false", arg])
    with pytest.raises(SystemExit) as stop:
        main()
    assert f"{stop.value}".startswith(f"dma-lightning fit: {message}")
    assert "\n" not in f"{stop.value}"


@pytest.mark.parametrize("args", [["fti"], []])
def test_an_unknown_command_is_told_all(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dma-lightning", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "expected a command of fit, validate, test, predict, init, generate, prepare, " in told
    assert ("did you mean 'fit'?" in told) == (args == ["fti"])


def test_another_class_keeps_what_it_has_too() -> None:
    """As docs/command-line.md says; of the arguments of the class before, the others are dropped."""
    data = ["--data.sequence_length=32", "--data.val_fraction=0.2", "--data=MQARDataModule"]
    cli = build(config("model/tiny"), config("data/pydoc"), *data, "--data.num_pairs=2")
    assert (cli.datamodule.sequence_length, type(cli.datamodule)) == (32, MQARDataModule)


def test_metrics_that_nobody_logs_are_told() -> None:
    report = ["--fit_report.metric=val/los", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    cli = build(config("model/tiny"), config("data/pydoc"), *report)
    with pytest.raises(ValueError, match=r"metric: expected one of \['val/loss', .*\], got 'val/los'"):
        cli.trainer.fit(cli.model, cli.datamodule)


def test_errors_that_are_no_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("of another package")

    monkeypatch.setattr("dma_lightning.cli.entry.build_cli", fail)
    monkeypatch.setattr("sys.argv", ["dma-lightning", "fit"])
    with pytest.raises(ValueError, match="of another package"):
        main()


def test_what_is_switched_off_takes_its_callback_along() -> None:
    layers = [config(name) for name in ("model/tiny", "data/pydoc", "trainer/cpu")]
    options = ["logger", "enable_checkpointing", "enable_progress_bar"]
    trainer = build(*layers, *(f"--trainer.{option}=false" for option in options)).trainer
    refused = (LearningRateMonitor, Checkpoint, ProgressBar)
    assert not any(isinstance(callback, refused) for callback in trainer.callbacks)


def test_missing_text_ends_before_training() -> None:
    cli = build(config("model/tiny"), config("data/pydoc"), "--data.path=/no/such/text", "--trainer.max_steps=1")
    with pytest.raises(ValueError, match="expected a text file, a folder with files or a glob that matches"):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 0


def test_schedule_without_an_end() -> None:
    cli = build(config("model/tiny"), config("data/pydoc"), "--trainer.max_epochs=-1")
    with pytest.raises(ValueError, match=r"schedule 'wsd': expected a run whose steps can be counted"):
        cli.trainer.fit(cli.model, cli.datamodule)


def test_window_beyond_the_sequence_trains_with_a_warning() -> None:
    args = ["--model.keep_window_size=64", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    cli = build(config("model/mqar"), config("data/mqar"), *args)
    assert isinstance(cli.datamodule, MQARDataModule)
    with pytest.warns(UserWarning, match=r"keep_window_size 64 \+ keep_last 8 >= sequence length 64: no key is ever"):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 1


def test_plugin_of_the_slurm_recipe() -> None:
    recipe = (CONFIGS.parent / "docs/training.md").read_text()
    plugin = recipe.split("--trainer.plugins '")[1].split("'")[0]
    cli = build(config("model/tiny"), config("data/pydoc"), f"--trainer.plugins={plugin}")
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert not environment.auto_requeue


def about(*args: str) -> None:
    with pytest.raises(SystemExit) as stop:
        build_cli(list(args))
    assert stop.value.code == 0


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    about("--version")
    assert capsys.readouterr().out == f"dma-lightning {dma_lightning.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", dma_lightning.__version__)


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    about("--help")
    shown = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} +[A-Z]", shown, re.MULTILINE) for name in [*DMACLI.subcommands(), *_COMMANDS])


def test_a_shell_completes_our_commands_and_their_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside Lightning's, whose options, with those of every class that they take, are many."""
    pytest.importorskip("shtab")
    monkeypatch.setattr(DMACLI, "subcommands", staticmethod(dict))
    about("--print_completion=shtab-bash")
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    for line, expected in (
        ("dma-lightning gen", "generate"),
        ("dma-lightning generate --prompt_", "--prompt_file"),
        ("dma-lightning prepare --special_tokens pa", "parse"),
    ):
        words = line.split()
        script = (
            f"source {tmp_path / 'completion'}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            f"COMP_LINE='{line}'; COMP_POINT={len(line)}; "
            f"_shtab_dma_lightning dma-lightning {words[-1]} {words[-2]}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
        assert found.stdout.split() == [expected], found


def test_only_the_program_itself_prints_completions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_cli(["fit", "--print_completion=jsonschema"])
    assert "print_completion" in capsys.readouterr().err
