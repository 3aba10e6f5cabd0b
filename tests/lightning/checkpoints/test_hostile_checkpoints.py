"""No checkpoint can run code, import anything, or touch files other than the run's own."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import small_run
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import CHECKPOINTS, DATA, SIZES, TRAINER, changed, fit, validate

from dma_lightning import LanguageModel, MQARDataModule, PreparedDataModule, TextDataModule
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.io import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from dma_lightning.cli import build_cli, main
from dma_lightning.cli.ckpt_path import check_weights, open_ckpt_path
from dma_lightning.cli.ckpt_path import saved_defaults as defaults_of
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import SequenceDataModule
from dma_lightning.data.restoring import SavedData, data_arguments
from dma_lightning.files.locks import locked_folder
from dma_lightning.plain_values import plain
from dma_lightning.saved_run import SavedRun
from dma_lightning.trained_models import load_checkpoint

LAST = f"{CHECKPOINTS}/last.ckpt"
made: list[object] = []  # what `Trap` was called with


class Trap:
    """An object that no checkpoint may create."""

    def __init__(self, **given: object) -> None:
        made.append(given)


class OwnData(MQARDataModule):
    """A user's own data module."""


@pytest.fixture
def run(_small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the small run, as the working folder."""
    subprocess.run(["cp", "-a", f"{_small_run}/.", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    made.clear()
    yield tmp_path
    assert not made


def saved_defaults(path: Path) -> tuple[dict[str, Any], SavedData]:
    """What the command line takes from a checkpoint, and what the checkpoint says about its data."""
    saved = open_ckpt_path(str(path))
    return defaults_of(saved), saved.data


def command(*args: str) -> Callable[[str, pytest.MonkeyPatch], None]:
    """Call one of our own commands as from a shell. Its error message is raised."""

    def call(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["dma-lightning", *(arg.replace("CKPT", checkpoint) for arg in args)])
        try:
            main()
        except SystemExit as error:
            raise ValueError(error.code) from error

    return call


READERS = {
    "fit": lambda path, _: fit(f"--ckpt_path={path}", *DATA),
    "validate": lambda path, _: validate(path, *DATA),
    "generate": command("generate", "--ckpt_path=CKPT", "--prompt=a"),
    "export-hf": command("export-hf", "CKPT", "exported"),
    "Python": lambda path, _: LanguageModel.load_from_checkpoint(path),
}
SPEC = {"class_path": f"{__name__}.Trap", "init_args": {"a": 1}}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_makes_an_object_of_an_argument(reader: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = changed(lambda content: content["hyper_parameters"].update(attention_args={"x": SPEC}))
    with pytest.raises(ValueError, match=r"strange\.ckpt: hyper_parameters\.attention_args: Expected"):
        READERS[reader](str(evil), monkeypatch)


@pytest.mark.parametrize("name", ["lr", "betas", "eos_token_id", "backend", "unknown"])
def test_no_object_is_made_of_any_argument(name: str, run: Path) -> None:
    evil = changed(lambda content: content["hyper_parameters"].update({name: SPEC}))
    for read in (saved_defaults, LanguageModel.load_from_checkpoint):
        with pytest.raises(ValueError, match=rf"strange\.ckpt: hyper_parameters.*{name}") as error:
            read(evil)
        assert "\n" not in str(error.value)


def test_flags_and_configs_make_no_object_of_plain_fields(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(yaml.safe_dump({"model": {"attention_args": {"x": SPEC}}}))
    with pytest.raises(SystemExit):
        fit("--config=c.yaml", *DATA)
    assert "attention_args" in capsys.readouterr().err


def test_instantiators_in_a_checkpoint_are_not_used(run: Path) -> None:
    evil = changed(lambda content: content["hyper_parameters"].update(_instantiator=f"{__name__}.Trap"))
    assert LanguageModel.load_from_checkpoint(evil).hparams.keys() == {
        *LanguageModel().hparams,
        *LanguageModel.load_from_checkpoint(LAST).hparams,
    } - {"_instantiator"}


def test_classes_that_a_checkpoint_names_are_not_imported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(run))
    evil = changed(lambda content: content["datamodule_hyper_parameters"].update(_class_path="stranger.Data"))
    for kind in (SequenceDataModule, TextDataModule):
        with pytest.raises(ValueError, match=r"'stranger\.Data'"):
            kind.load_from_checkpoint(evil)
    with pytest.raises(
        ValueError, match=r"^data: expected .* names 'stranger\.Data' .* add --data with the class, and"
    ):
        validate(evil)
    assert "stranger" not in sys.modules


def test_a_users_class_takes_nothing_of_an_unknown_one(run: Path) -> None:
    stranger = {"_class_path": "stranger.Data", "batch_size": 3, "sequence_length": 8}
    evil = changed(lambda content: content.update(datamodule_hyper_parameters=stranger))
    options = ["--data.vocab_size=256", "--data.val_examples=4"]
    data = validate(f"{evil}", f"--data={__name__}.OwnData", *options).datamodule
    assert (type(data).__name__, data.batch_size, data.sequence_length) == ("OwnData", 64, 64)


def test_places_are_the_users_or_the_runs_own(run: Path) -> None:
    assert validate(LAST).datamodule.path == "text.txt"  # which the run's config.yaml names
    away = changed(lambda content: None)
    for flag, value, other in (("path", "text.txt", "cache_dir=cache"), ("cache_dir", "cache", "path=text.txt")):
        message = rf"^data\.{flag}: .* strange\.ckpt names '{value}' .*; add --data\.{flag}$"
        with pytest.raises(ValueError, match=message):
            validate(away, f"--data.{other}")
    Path("here.yaml").write_text("data: {class_path: dma_lightning.TextDataModule, init_args: {path: text.txt}}")
    data = validate(away, "--config=here.yaml", "--data.cache_dir=null", "--data.cache_dir=other").datamodule
    assert (data.path, data.cache_dir, data.sequence_length) == ("text.txt", Path("other"), 16)


@pytest.mark.parametrize("field", ["path", "cache_dir", "tokenizer"])
def test_other_places_than_the_runs_own_are_not_touched(field: str, run: Path) -> None:
    Path("secret").write_text("secret " * 200)
    folder = Path(CHECKPOINTS)
    value = "secret" if field == "path" else "made"
    evil = changed(lambda content: content["datamodule_hyper_parameters"].update({field: value}), folder / "evil.ckpt")
    assert saved_defaults(evil)[1].files == {field: value}
    with pytest.raises(ValueError, match=rf"\{{'{field}': '{value}'\}}; give them here"):
        TextDataModule.load_from_checkpoint(evil)
    assert not Path("made").exists()
    assert len(list(Path("cache").glob("*.bin"))) == 1


@pytest.mark.parametrize("text", ["[", "data: 3", "data: {init_args: [a]}", "&a [*a, *a]", "\x00", "a: " * 3000])
def test_damaged_configurations_confirm_nothing(text: str, run: Path) -> None:
    config = Path(CHECKPOINTS).parent / "config.yaml"
    config.write_text(text)
    assert saved_defaults(Path(LAST))[1].files == {"path": "text.txt", "cache_dir": "cache"}


def test_a_configuration_that_is_a_pipe_is_not_opened(run: Path) -> None:
    config = Path(CHECKPOINTS).parent / "config.yaml"
    config.unlink()
    os.mkfifo(config)
    assert saved_defaults(Path(LAST))[1].files == {"path": "text.txt", "cache_dir": "cache"}


def test_prepared_folders_are_asked_for_by_name(run: Path) -> None:
    prepare("text.txt", Path("prepared"), processes=1)
    saved = {"_class_path": "dma_lightning.PreparedDataModule", "path": "prepared", "sequence_length": 16}
    away = changed(lambda content: content.update(datamodule_hyper_parameters=saved))
    with pytest.raises(ValueError, match=r"^data\.path: expected a path that you name, .* 'prepared'"):
        validate(away)
    found = PreparedDataModule.load_from_checkpoint(away, path="prepared")
    assert (type(found), found.sequence_length) == (PreparedDataModule, 16)


def test_data_of_a_checkpoint_in_python(run: Path) -> None:
    for kind in (TextDataModule, SequenceDataModule):
        data = kind.load_from_checkpoint(LAST, batch_size=3)
        assert (type(data), data.batch_size, data.sequence_length, data.path) == (TextDataModule, 3, 16, "text.txt")
        assert data.state_dict()["position"]["batches_trained"] == 3
    with pytest.raises(ValueError, match=r"_class_path: expected MQARDataModule, got '.*TextDataModule'; load"):
        MQARDataModule.load_from_checkpoint(LAST)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "hyper_parameters",
            "of_tomorrow",
            1,
            r"hyper_parameters: .*\['of_tomorrow'\]; .* probably from a newer version",
        ),
        ("datamodule_hyper_parameters", "of_tomorrow", 1, r"datamodule_hyper_parameters: .*newer version"),
        ("hyper_parameters", "hidden_size", "16", r"hyper_parameters\.hidden_size: Expected `int`, got `str`"),
        ("hyper_parameters", "schedule", "up", r"hyper_parameters\.schedule: Invalid enum value 'up'"),
        ("datamodule_hyper_parameters", "batch_size", [4], r"datamodule_hyper_parameters\.batch_size: Expected `int`"),
        ("datamodule_hyper_parameters", "_class_path", 5, r"datamodule_hyper_parameters\._class_path: Expected"),
        (None, "hyper_parameters", [1], r"\$\.hyper_parameters"),
        (None, "global_step", "../../x", r"Expected `int`, got `str` - at `\$\.global_step`"),
        (None, "epoch", -1, r"Expected `int` >= 0 - at `\$\.epoch`"),
        (None, "state_dict", {"a": 3}, r"Expected `Tensor`, got `int` - at `\$\.state_dict"),
        (None, "callbacks", {"SpeedMonitor": {"tokens_seen": "x"}}, r"callbacks\.SpeedMonitor: Expected .*got `str`"),
        (None, "optimizer_states", {}, r"Expected `array`, got `object` - at `\$\.optimizer_states`"),
        (None, "pytorch-lightning_version", 2, r"\$\.pytorch-lightning_version"),
    ],
)
def test_parts_of_another_type_are_named(part: str | None, name: str, value: object, message: str, run: Path) -> None:
    evil = changed(lambda content: (content[part] if part else content).update({name: value}))
    with pytest.raises(ValueError, match=message) as error:
        saved_defaults(evil)
    assert "strange.ckpt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rng_states", [{"python": 3}]),
        ("loops", {"fit_loop": {"epoch_loop.batch_progress": 3}}),
    ],
)
def test_states_that_cannot_be_restored_are_told(name: str, value: object, run: Path) -> None:
    evil = changed(lambda content: content.update({name: value}))
    with pytest.raises(ValueError, match=r"strange\.ckpt: .*expected (random )?states.*, got others") as error:
        fit("--trainer.max_steps=4", f"--ckpt_path={evil}", *DATA)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**7, r"num_hidden_layers: expected 1, the layers with weights, got 10000000"),
        (
            "hidden_size",
            2**40,
            r"expected sizes of a model, got sizes that are too large|embed_tokens\.weight: expected",
        ),
        ("intermediate_size", 17, r"state_dict\.model\.layers\.0\.mlp\.down_proj\.weight: expected .*17\), .*, got"),
    ],
)
def test_sizes_are_compared_before_anything_is_made(name: str, value: int, message: str, run: Path) -> None:
    evil = changed(lambda content: content["hyper_parameters"].update({name: value}))
    arguments = {"num_hidden_layers": 4} | read_checkpoint(evil)["hyper_parameters"]
    arguments = {name: value for name, value in arguments.items() if not name.startswith("_")}
    for read in (LanguageModel.load_from_checkpoint, lambda path: check_weights(SavedRun.open(path), arguments)):
        start = time.process_time()
        with pytest.raises(ValueError, match=message):
            read(evil)
        assert time.process_time() - start < 1


def test_the_command_line_compares_sizes_first(run: Path) -> None:
    evil = changed(lambda content: content["hyper_parameters"].update(num_hidden_layers=10**7))
    with pytest.raises(ValueError, match="num_hidden_layers: expected 1, the layers with weights, got 10000000"):
        validate(evil, *DATA)


@pytest.mark.parametrize("weight", [torch.zeros(1).expand(256, 16), torch.empty(256, 16, device="meta")])
def test_weights_that_are_not_in_the_file(weight: torch.Tensor, run: Path) -> None:
    evil = changed(lambda content: content["state_dict"].update({"model.embed_tokens.weight": weight}))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: expected \(256, 16\) numbers in the file, got fewer"):
        read_checkpoint(evil)


def test_models_of_checkpoints_in_python(run: Path) -> None:
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    model = LanguageModel.load_from_checkpoint(LAST, map_location="cpu", weights_only=True, lr=0.5, keep_window_size=3)
    assert (model.hparams.lr, model.model.config.keep_window_size, model.model.config.hidden_size) == (0.5, 3, 16)
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"state_dict\.model.*: expected floating point numbers of shape .*, got no such weight"
    ):
        LanguageModel.load_from_checkpoint(LAST, attention_bias=True)
    loose = LanguageModel.load_from_checkpoint(LAST, strict=False, attention_bias=True)
    torch.testing.assert_close(loose.model.embed_tokens.weight, weights["model.embed_tokens.weight"], rtol=0, atol=0)
    with pytest.raises(TypeError, match="keep_windw_size"):
        LanguageModel.load_from_checkpoint(LAST, keep_windw_size=3)


def test_weights_of_another_kind_are_refused(run: Path) -> None:
    evil = changed(lambda content: content["state_dict"].update({"model.norm.weight": torch.ones(16).long()}))
    message = r"model\.norm\.weight: expected floating point numbers of shape \(16,\), .*, got other numbers of shape"
    with pytest.raises(ValueError, match=message):
        LanguageModel.load_from_checkpoint(evil)


def test_values_that_no_model_takes_are_told_with_the_file(run: Path) -> None:
    evil = changed(lambda content: content["hyper_parameters"].update(warmup_fraction=-0.9))
    with pytest.raises(
        ValueError, match=rf"{evil}: hyper_parameters: warmup_fraction and decay_fraction: expected two"
    ):
        LanguageModel.load_from_checkpoint(evil)


POSITION = {"epoch": 0, "batches": 1, "batches_trained": 1, "seed": 0, "sequences": 9, "processes": 1, "batch_size": 1}


@pytest.mark.parametrize("position", [POSITION | {"epoch": "1"}, POSITION | {"batches": -1}, {"epoch": 1}, [1]])
def test_positions_in_the_data_are_checked(position: object) -> None:
    data = MQARDataModule()
    data.load_state_dict({"position": POSITION})
    with pytest.raises(ValueError, match="data position: "):
        data.load_state_dict({"position": position})


@pytest.mark.parametrize("kind", [LanguageModel, TextDataModule])
def test_only_files_of_this_machine_are_read(kind: type, run: Path) -> None:
    for path in ("http://127.0.0.1:9/e.ckpt", io.BytesIO(b"")):
        with pytest.raises(ValueError, match=r"expected a file on this machine, got .*; download it first"):
            kind.load_from_checkpoint(path)
    with pytest.raises(ValueError, match="weights_only: expected true"):
        kind.load_from_checkpoint(LAST, weights_only=False)


class Subclass(LanguageModel):
    """A subclass with an additional argument."""

    def __init__(self, extra: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.extra = extra


def test_subclasses_have_arguments_of_their_own(run: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=0, enable_progress_bar=False)
    trainer.strategy.connect(Subclass(extra=3, **SIZES))
    trainer.save_checkpoint("own.ckpt")
    assert Subclass.load_from_checkpoint("own.ckpt").extra == 3
    with pytest.raises(ValueError, match=r"\['extra'\]"):
        LanguageModel.load_from_checkpoint("own.ckpt")


def state_of_saving(content: dict[str, Any]) -> dict[str, Any]:
    """What `ResumableCheckpoint` has saved."""
    return next(state for name, state in content["callbacks"].items() if name.startswith("ResumableCheckpoint"))


@pytest.mark.parametrize("victim", ["folder", "file.ckpt"])
def test_going_on_touches_no_other_file(victim: str, run: Path) -> None:
    inner, others = Path("folder/inner"), [Path(CHECKPOINTS, name) for name in ("../step=9.ckpt", "own.txt")]
    inner.parent.mkdir()
    for file in (inner, Path("file.ckpt"), *others):
        file.write_text("precious")
    (link := Path(CHECKPOINTS, "step=8.ckpt")).symlink_to("own.txt")
    given = [victim, str(Path(victim).absolute()), *map(str, others), str(link), "folder", "file.ckpt"]

    def name_it(content: dict[str, Any]) -> None:
        paths = {"last_model_path": victim, "best_model_path": victim, "kth_best_model_path": victim, "kept": given}
        state_of_saving(content).update(paths)

    changed(name_it, f"{CHECKPOINTS}/step=3.ckpt")
    assert fit("--ckpt_path=last", "--trainer.max_steps=6", *DATA).trainer.log_dir == "runs/small/version_0"
    for file in (inner, Path("file.ckpt"), *others):
        assert file.read_text() == "precious"
        assert file.resolve() == Path.cwd() / os.path.normpath(file)
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("filename", "own", "strange"),
    [
        (
            "{step}",
            ["step=3.ckpt", "step=3-v1.ckpt"],
            ["step=.ckpt", "x-step=3.ckpt", "step=3.txt", "step=3-v1.ckpt.tmp"],
        ),
        ("{epoch}-{step:06d}", ["epoch=0-step=000003.ckpt"], ["step=3.ckpt", "epoch=0.ckpt"]),
        ("a.b_{step}", ["a.b_step=3.ckpt"], ["aXb_step=3.ckpt"]),
    ],
)
def test_names_that_the_callback_writes(filename: str, own: list[str], strange: list[str], tmp_path: Path) -> None:
    saving = ResumableCheckpoint(dirpath=tmp_path, filename=filename)
    assert Path(saving.format_checkpoint_name({"step": torch.tensor(3), "epoch": torch.tensor(0)})).name == own[0]
    saving.load_state_dict({"kept": [f"{tmp_path}/{name}" for name in own + strange]})
    assert saving._kept == [f"{tmp_path}/{name}" for name in own]


def test_figures_of_the_best_are_taken_over(tmp_path: Path) -> None:
    options = {"dirpath": tmp_path, "monitor": "val/loss", "save_top_k": 2}
    names = {"step=1.ckpt": 3.0, "step=2.ckpt": 2.0, "../step=3.ckpt": 1.0}
    scores = {f"{tmp_path}/{name}": torch.tensor(score) for name, score in names.items()}
    saving = ResumableCheckpoint(**options)
    saving.load_state_dict({"best_k_models": scores, "best_model_path": "/etc/passwd"})
    assert (Path(saving.best_model_path).name, saving.best_model_score.item()) == ("step=2.ckpt", 2.0)
    assert (Path(saving.kth_best_model_path).name, saving.kth_value.item()) == ("step=1.ckpt", 3.0)
    for wrong in ({"a": torch.tensor(torch.nan)}, {"a": torch.zeros(2)}, {"a": "1"}, [1]):
        with pytest.raises(ValueError, match=r"ResumableCheckpoint.*best_k_models"):
            ResumableCheckpoint(**options).load_state_dict({"best_k_models": wrong})


def fail(*_: object) -> None:
    """A replacement for a method, which fails."""
    raise ArithmeticError


def test_two_runs_do_not_share_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = ["--ckpt_path=last", "--trainer.max_steps=4", *DATA]
    with (
        locked_folder(Path(CHECKPOINTS), "x"),
        pytest.raises(ValueError, match=rf"checkpoints: expected no other .*got process {os.getpid()} on .*; wait"),
    ):
        fit(*again)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", fail)
        with pytest.raises(ArithmeticError):
            fit(*again)
    assert fit(*again).trainer.global_step == 4  # the lock has ended with the run


def test_a_lock_is_that_of_all_callbacks_and_processes_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ResumableCheckpoint(dirpath=tmp_path), ResumableCheckpoint(dirpath=tmp_path, monitor="val/loss")
    trainer = SimpleNamespace(is_global_zero=True, world_size=1, checkpoint_callbacks=[first, second])
    first._lock(trainer)
    second._lock(trainer)
    stranger = ResumableCheckpoint(dirpath=tmp_path)
    alone = SimpleNamespace(is_global_zero=True, world_size=1, checkpoint_callbacks=[stranger])
    with pytest.raises(ValueError, match="expected no other process to write there"):
        stranger._lock(alone)
    first._unlock()
    stranger._lock(alone)
    stranger._unlock()
    monkeypatch.setattr("dma_lightning.checkpoints.resumable.of_all_processes", lambda own, _: ["it is taken", own])
    with pytest.raises(ValueError, match="it is taken"):  # what the first process has found
        stranger._lock(SimpleNamespace(is_global_zero=False, checkpoint_callbacks=[stranger]))


SCHEDULER = {"last_epoch": 3, "_step_count": 4, "base_lrs": [0.1], "_last_lr": [0.1]}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"lr_schedulers": [{}]}, "missing required field `last_epoch`"),
        ({"lr_schedulers": [SCHEDULER | {"last_epoch": "x"}]}, r"Expected `int`, got `str` - at `\$\.lr_schedulers"),
        (
            {"lr_schedulers": [SCHEDULER | {"step": 1}]},
            r"lr_schedulers: expected the state of LambdaLR, got \['step'\]",
        ),
        ({"loops": {"fit_loop": {"x": [{"completed": "x"}]}}}, r"loops\.fit_loop\.x\.0\.completed: expected a number"),
        (
            {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1).expand(9)}}, "param_groups": []}]},
            r"optimizer_states\.0\.state\.0\.exp_avg: expected \(9,\) numbers in the file, got fewer",
        ),
    ],
)
def test_states_of_another_kind_are_told(part: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(part, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.ckpt")


def test_lightnings_own_callback_removes_nothing_that_a_checkpoint_names(run: Path) -> None:
    (run / "important").mkdir()
    (run / "important/a.txt").write_text("keep")
    state = ModelCheckpoint(dirpath=run / "checkpoints").state_dict()
    state |= {"best_model_path": "checkpoints/../important", "best_k_models": {"checkpoints/../important": 1}}
    evil = changed(lambda content: content["callbacks"].update({ModelCheckpoint().state_key: state}))
    quiet = ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    quiet += ["--checkpoint=null", "--trainer.enable_checkpointing=true"]
    small_run.cli("fit", "--trainer.accelerator=cpu", "--trainer.max_steps=6", *quiet, f"--ckpt_path={evil}", *DATA)
    assert list(run.glob("checkpoints/*.ckpt"))
    assert (run / "important/a.txt").read_text() == "keep"


def test_links_do_not_lead_writing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt.tmp").symlink_to(tmp_path / "victim")
    (folder / ".lock-holder").symlink_to(tmp_path / "victim")
    with locked_folder(folder, "wait"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 1}, folder / "last.ckpt")
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 1
    assert (tmp_path / "victim").read_text() == "keep"


def test_a_tokenizers_data_of_before_are_read_as_before(run: Path) -> None:
    """There was no choice of what becomes of text that spells a special token."""
    saved = {"_class_path": "dma_lightning.TextDataModule", "tokenizer": "t.json", "sequence_length": 16}
    found = data_arguments({"datamodule_hyper_parameters": saved}, run / CHECKPOINTS / "last.ckpt")
    assert found.arguments["special_tokens"] == "parse"


def test_pipes_are_not_opened(run: Path) -> None:
    pipe = Path(CHECKPOINTS, "step=9.ckpt")
    os.mkfifo(pipe)
    with pytest.warns(
        UserWarning, match=r"last skips .*step=9\.ckpt: expected a checkpoint, got something that is not"
    ):
        assert newest_checkpoint([run]).name == "step=3.ckpt"
    for call in (read_checkpoint, LanguageModel.load_from_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(
            ValueError, match=r"step=9\.ckpt: expected a checkpoint, got something that is not a regular"
        ):
            call(pipe)
    with pytest.raises(ValueError, match="is not a regular file"):
        saved_defaults(pipe)
    with pytest.raises(ValueError, match="is not a regular file"):
        validate(f"file://{pipe.absolute()}")


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_code_in_a_checkpoint_is_named_and_not_advised(run: Path) -> None:
    evil = changed(lambda content: content.update(harm=Harmful()))
    for read in (saved_defaults, LanguageModel.load_from_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=r"expected .* plain values, got 'posix\.mkdir', which could") as error:
            read(evil)
        assert "weights_only" not in str(error.value)
    assert not Path("harm").exists()


@pytest.mark.parametrize("value", [np.float64(1), Path("x"), Harmful(), {"a": {1, Harmful}}])
def test_nothing_is_saved_that_could_not_be_read(value: object, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(5)}, path)
    with pytest.raises(ValueError, match=r"expected only tensors, numbers, text and containers, got '.*'"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(5), "callbacks": {"mine": value}}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert read_checkpoint(path)["x"].sum() == 5


def test_arguments_are_saved_as_plain_values(run: Path) -> None:
    model = LanguageModel(
        **SIZES | {"keep_window_size": np.int64(4), "eos_token_id": [np.int32(3)]},
        lr=np.float64(1e-3),
        betas=(np.float32(0.5), 0.25),
        max_position_embeddings=16,
        bytes_per_token=1.0,
        schedule="constant",
    )
    data = TextDataModule(Path("text.txt"), sequence_length=16, val_fraction=np.float64(0.25), cache_dir=Path("cache"))
    saving = ResumableCheckpoint(1, dirpath="plain")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=1, callbacks=[saving], limit_val_batches=0
    )
    trainer.fit(model, data)
    loaded = load_checkpoint(Path("plain/last.ckpt"), "cpu")
    assert loaded.hparams.betas == (0.5, 0.25)
    assert (loaded.model.config.eos_token_id, loaded.model.config.keep_window_size) == ([3], 4)
    assert type(model.model.config.keep_window_size) is int
    saved = torch.load("plain/last.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert (saved["path"], saved["cache_dir"], saved["val_fraction"]) == ("text.txt", "cache", 0.25)
    assert dict(data.hparams_initial)["path"] == "text.txt"


def test_what_is_not_plain_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"LanguageModel\.lr: expected numbers, text, or lists .*got tensor"):
        LanguageModel(lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"MQARDataModule\.seed: expected numbers"):
        MQARDataModule(seed=torch.tensor(0))
    nested = {"a": (torch.Size([1, 2]), [np.bool_(True), np.str_("b"), None]), "c": Path("d")}
    assert plain(nested, "x") == {"a": ((1, 2), [True, "b", None]), "c": "d"}
    assert type(plain(nested, "x")["a"][0]) is tuple


def test_a_model_that_was_validated_can_be_trained(run: Path) -> None:
    cli = build_cli([*TRAINER, *small_run.MODEL, *DATA, "--trainer.max_steps=1", "--trainer.logger=false"], run=False)
    before = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 1
    assert cli.trainer.validate(cli.model, cli.datamodule, verbose=False) != before
