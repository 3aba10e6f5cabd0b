"""Monitors, gradient guard and checkpoints are on unless a run turns them off, and have options of their own."""

from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import small_run
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from dma_lightning.callbacks import GradientGuard, MixedWindows
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.cli.ckpt_path import run_folders
from dma_lightning.cli.default_callbacks import DEFAULT_CALLBACKS, check_flags, set_callbacks
from dma_lightning.cli.entry import DMACLI
from dma_lightning.monitoring import ProgressBar


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(*args: str) -> DMACLI:
    """What `fit` would run, given the shipped configs for a CPU and more arguments."""
    with mock.patch.object(DMACLI, "_run_subcommand"):
        return small_run.cli("fit", "-c", "mqar.yaml", "-c", "trainer/cpu", *args)


def callbacks(
    fits: bool = True, off: tuple[str, ...] = (), learns_ranks: bool = True, **options: object
) -> tuple[list[pl.Callback], Namespace]:
    """All callbacks of a run, and the resulting options of the trainer. Those in `off` are null."""
    names = ("callbacks", "precision", "logger", "enable_progress_bar", "enable_checkpointing")
    trainer = Namespace(dict.fromkeys(names) | {"barebones": False} | options)
    defaults = {x: None if x in off else kind() for x, kind in DEFAULT_CALLBACKS.items()}
    set_callbacks(trainer, defaults, fits, learns_ranks)
    return trainer.callbacks, trainer


def kinds(*args: object, **options: object) -> list[type[pl.Callback]]:
    return [type(x) for x in callbacks(*args, **options)[0]]


ALL = list(DEFAULT_CALLBACKS.values())


def test_all_are_there_unasked_and_a_second_config_takes_none_of_them(tmp_path: Path) -> None:
    Path("mqar.yaml").write_text("data: {class_path: MQARDataModule}\nmask_monitor: {every_n_steps: 7}\n")
    listed = [{"class_path": f"dma_lightning.{x}"} for x in ("callbacks.MixedWindows", "stability.GradientGuard")]
    second = {"trainer": {"callbacks": listed}, "checkpoint": {"save_top_k": -1}, "final_metrics": None}
    Path("second.yaml").write_text(yaml.safe_dump(second))
    cli = made("-c", "second.yaml", "--lr_monitor=null", "--fit_report.metric=val/accuracy", "--trainer.logger=false")
    found = {type(x).__name__: x for x in cli.trainer.callbacks}
    missing = [name for name, kind in DEFAULT_CALLBACKS.items() if kind.__name__ not in found]
    assert missing == ["lr_monitor", "final_metrics"]
    assert "MixedWindows" in found
    assert sum(isinstance(x, GradientGuard) for x in cli.trainer.callbacks) == 1
    checkpoint = found["ResumableCheckpoint"]
    assert (checkpoint._every_n_train_steps, checkpoint.save_top_k) == (100, -1)  # one from each config
    assert (found["DynamicMaskMonitor"].every_n_steps, found["FitReport"].metric) == (7, "val/accuracy")

    parser = cli._subcommand_parsers["fit"]
    parser.save(cli.config.fit, "saved.yaml", skip_unset=False)
    saved = yaml.safe_load(Path("saved.yaml").read_text())
    assert (saved["lr_monitor"], saved["checkpoint"]["init_args"]["save_top_k"]) == (None, -1)
    again, before = parser.parse_args(["--config=saved.yaml"]), cli.config.fit
    assert again.as_dict() | {"config": None} == before.as_dict() | {"config": None}


def test_a_listed_one_replaces_the_default_of_its_class() -> None:
    class Own(GradientGuard):
        pass

    own, best, bar = Own(), ModelCheckpoint(monitor="val/loss"), TQDMProgressBar()
    found, _ = callbacks(callbacks=[own, best, bar])
    assert [type(x) for x in found] == [x for x in ALL if x not in (GradientGuard, ProgressBar)] + [
        Own,
        ModelCheckpoint,
        TQDMProgressBar,
    ]  # the best are kept beside the checkpoints to go on from; there can be one bar alone
    assert kinds(callbacks=ResumableCheckpoint()).count(ResumableCheckpoint) == 1


def test_what_is_off_is_not_replaced_by_lightning() -> None:
    found, options = callbacks(off=("progress_bar", "checkpoint"))
    assert not any(isinstance(x, Checkpoint | LightningProgressBar) for x in found)
    assert (options.enable_progress_bar, options.enable_checkpointing) == (False, False)
    found, options = callbacks(off=("checkpoint",), callbacks=[ModelCheckpoint()])
    assert options.enable_checkpointing is None


def test_where_there_are_fewer() -> None:
    assert kinds(False) == [ProgressBar]  # of `validate`
    assert kinds(barebones=True) == []
    assert [x for x in ALL if x not in kinds(learns_ranks=False)] == [MixedWindows]
    assert MixedWindows in kinds(learns_ranks=False, callbacks=[MixedWindows()])  # who asks for it gets it
    assert LearningRateMonitor not in kinds(logger=False)
    with pytest.warns(UserWarning, match="guard: left out, since precision 16-mixed skips steps by itself"):
        assert [x for x in ALL if x not in kinds(precision="16-mixed")] == [GradientGuard]


def test_a_flag_for_one_that_is_replaced_is_refused() -> None:
    defaults = {"guard": GradientGuard()}
    check_flags(["--guard.spike=stop"], defaults, Namespace(callbacks=[ResumableCheckpoint()]))
    check_flags(["--guard=null"], {"guard": None}, Namespace(callbacks=[GradientGuard()]))
    with pytest.raises(ValueError, match=r"--guard\.spike: expected no GradientGuard in trainer\.callbacks, got one"):
        check_flags(["--guard.spike=stop"], defaults, Namespace(callbacks=GradientGuard()))


def test_a_folder_of_the_default_checkpoints_is_looked_into() -> None:
    listed = Namespace(class_path="lightning.pytorch.callbacks.ModelCheckpoint", init_args=Namespace(dirpath="best"))
    default = Namespace(class_path="dma_lightning.checkpoints.ResumableCheckpoint", init_args=Namespace(dirpath="own"))
    trainer = Namespace(callbacks=[listed], logger=False, default_root_dir=None)
    assert run_folders(Namespace(trainer=trainer, checkpoint=default)) == [Path("best"), Path("own")]
    assert run_folders(Namespace(trainer=trainer, checkpoint=None)) == [Path("best")]
