"""Whatever interrupts a run, `ckpt_path last` continues from the newest complete checkpoint with identical results."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import kill_runs
import lightning.pytorch as pl
import pytest
import torch
import yaml
from harmful import Harmful
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor

from dma_lightning import LanguageModel, MQARDataModule
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.io import AtomicCheckpointIO, newest_checkpoint
from dma_lightning.checkpoints.sharded import replace_folder
from dma_lightning.cli.entry import DMACLI, build_cli
from dma_lightning.cli.unstarted_runs import UnstartedRuns
from dma_lightning.files.atomic import atomic_write

STEPS = 9
CSV = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", *kill_runs.LOGGER[1:]]
SMALL = [*kill_runs.OPTIONS[:-1], *CSV]  # without the recorder


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread, which is faster for tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class OnPurposeError(Exception):
    """Raised by a test to interrupt training."""


class Interrupt(pl.Callback):
    """Performs an action in a hook after a given number of batches, and collects the losses."""

    def __init__(self, hook: str = "", batches: int = 0, action: Callable[[], None] | None = None) -> None:
        self.losses: dict[int, float] = {}
        if hook:
            setattr(self, hook, lambda trainer, *_: self._maybe(trainer, batches, action))

    @staticmethod
    def _maybe(trainer: pl.Trainer, batches: int, action: Callable[[], None]) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == batches and not trainer.sanity_checking:
            action()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.losses[trainer.fit_loop.epoch_loop.batch_progress.total.ready] = loss.item()


def fail() -> None:
    raise OnPurposeError


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate_all() -> None:
    """Terminate this process and its data workers, as batch systems do."""
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    terminate()


def train(
    folder: Path,
    *callbacks: pl.Callback,
    ckpt_path: Path | None = None,
    every: int = 100,
    num_workers: int = 0,
    **options: object,
) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Train in this process: two batches per step, 6 1/2 steps per epoch, with dropout, a schedule and validations.

    Returns:
        The losses of all batches, and the weights at the end.
    """
    pl.seed_everything(1, verbose=False)
    model = LanguageModel(
        vocab_size=64,
        max_position_embeddings=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        keep_window_size=4,
        hidden_dropout=0.2,
    )
    data = MQARDataModule(64, 16, 2, train_examples=52, val_examples=4, batch_size=4, num_workers=num_workers)
    losses = Interrupt()
    arguments = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    saving = ResumableCheckpoint(every, dirpath=folder)
    trainer = pl.Trainer(
        **(arguments | options), callbacks=[saving, *callbacks, losses], plugins=[AtomicCheckpointIO()]
    )
    torch.manual_seed(123 if ckpt_path else 1)  # a resumed process begins with other random numbers
    try:
        trainer.fit(model, data, ckpt_path=ckpt_path)
    finally:
        train.losses = losses.losses
    return losses.losses, model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[str, Tensor]]:
    """The uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
        return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("hook", "batches", "action", "saved_step"),
    [
        ("on_before_backward", 3, fail, None),  # what was saved is what came before: nothing, or the last validation
        ("on_before_optimizer_step", 6, fail, 2),
        ("on_train_batch_end", 6, fail, 2),
        ("on_train_batch_end", 12, fail, 4),  # a validation follows
        ("on_train_epoch_end", 13, fail, 6),
        ("on_train_epoch_start", 13, fail, 6),
        ("on_validation_start", 12, fail, 4),
        ("on_before_backward", 14, fail, 6),  # the first of an epoch
        ("on_before_backward", 5, interrupt, 3),
        ("on_before_backward", 6, interrupt, 3),
        ("on_before_backward", 5, terminate, 3),
        ("on_train_batch_end", 6, terminate, 3),
        ("on_validation_start", 8, terminate, 4),
        ("on_train_epoch_end", 13, terminate, 8),
    ],
)
def test_resumed_run_is_the_same_run(
    hook: str, batches: int, action: Callable[[], None], saved_step: int | None, whole: tuple, tmp_path: Path
) -> None:
    with pytest.raises(OnPurposeError if action is fail else SystemExit):
        train(tmp_path, Interrupt(hook, batches, action))
    before = train.losses
    path = newest_checkpoint([tmp_path])
    assert (path is None) == (saved_step is None)
    if path is not None:
        assert torch.load(path, weights_only=True)["global_step"] == saved_step
        assert (tmp_path / "last.ckpt").resolve() == path.resolve()
    losses, weights = train(tmp_path, ckpt_path=path)
    assert before | losses == whole[0]
    torch.testing.assert_close(weights, whole[1], rtol=0, atol=0)


def test_weights_that_were_changing_are_not_saved(
    whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torn(torch.optim.AdamW):
        def step(self, closure: Callable[[], Tensor] | None = None) -> None:
            super().step(closure)
            if next(iter(self.state.values()))["step"] == 5:
                raise OnPurposeError

    with monkeypatch.context() as patch:
        patch.setattr("dma_lightning.optimizers.AdamW", Torn)
        with pytest.raises(OnPurposeError):
            train(tmp_path)
    path = newest_checkpoint([tmp_path])
    assert torch.load(path, weights_only=True)["global_step"] == 4  # saved behind the validation
    losses, weights = train(tmp_path, ckpt_path=path)
    assert losses.items() <= whole[0].items()
    torch.testing.assert_close(weights, whole[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["{step}-{val/loss:.2f}", "best/{step}"])
def test_file_names_make_no_folders(name: str) -> None:
    with pytest.raises(ValueError, match="filename: expected a name without a folder"):
        ResumableCheckpoint(filename=name)
    assert ResumableCheckpoint(filename="{step}-{val/loss:.2f}", auto_insert_metric_name=False)


def test_the_old_link_stands_until_the_new_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    train(tmp_path, max_steps=2)
    monkeypatch.setattr(Path, "symlink_to", is_full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, max_steps=4, ckpt_path=tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").resolve().name == "step=2.ckpt"


def test_the_checkpoint_before_the_newest_is_kept(whole: tuple, tmp_path: Path) -> None:
    def steps() -> set[str]:
        return {file.name for file in tmp_path.glob("[!.]*") if not file.is_symlink()}

    train(tmp_path, max_steps=5, every=1)
    assert steps() == {"step=4.ckpt", "step=5.ckpt"}
    (tmp_path / "step=5.ckpt").write_bytes((tmp_path / "step=5.ckpt").read_bytes()[:5000])
    with pytest.warns(UserWarning, match=r"last skips .*step=5\.ckpt"):
        path = newest_checkpoint([tmp_path])
    (tmp_path / "step=5.ckpt").unlink()
    assert path.name == "step=4.ckpt"
    losses, _ = train(tmp_path, ckpt_path=path, every=1)
    assert losses.items() <= whole[0].items()
    assert steps() == {"step=4.ckpt", "step=8.ckpt", "step=9.ckpt"}  # the one gone on from stays


def test_a_validation_at_the_end_of_an_epoch_is_followed_by_a_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, val_check_interval=1.0, check_val_every_n_epoch=1)  # as Lightning does by default
    assert {file.name for file in tmp_path.glob("[!.]*")} == {"step=7.ckpt", "step=9.ckpt", "last.ckpt"}


@pytest.mark.parametrize("action", [interrupt, terminate])
def test_parts_of_a_run_leave_no_more_than_one(action: Callable[[], None], whole: tuple, tmp_path: Path) -> None:
    path = None
    for step in (1, 3, 5):
        with pytest.raises(SystemExit):
            train(tmp_path, Interrupt("on_train_batch_end", 2 * step, action), ckpt_path=path)
        path = newest_checkpoint([tmp_path])
        assert path.name == f"step={step}.ckpt"
    assert {file.name for file in tmp_path.glob("[!.]*")} == {f"step={n}.ckpt" for n in (3, 4, 5)} | {"last.ckpt"}
    _, weights = train(tmp_path, ckpt_path=path)
    torch.testing.assert_close(weights, whole[1], rtol=0, atol=0)


def test_what_a_kill_left_behind_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ResumableCheckpoint, "_remove_checkpoint", lambda *_: fail())
        with pytest.raises(OnPurposeError):
            train(tmp_path, every=1)
    assert (tmp_path / "step=1.ckpt").exists()
    train(tmp_path, ckpt_path=tmp_path / "step=3.ckpt", every=1)
    assert not (tmp_path / "step=1.ckpt").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": 0},
        {"every_n_epochs": 1},
        {"train_time_interval": timedelta(0)},  # with which Lightning's own saves after every step
        {"save_on_exception": True},
        {"save_weights_only": True},
    ],
)
def test_options_that_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected every_n_train_steps >= 1 and none of every_n_epochs, .*, got"):
        ResumableCheckpoint(**options)


def test_options_that_would_lose_the_newest() -> None:
    with pytest.raises(ValueError, match=r"filename: expected \{step\} in it, .*; got 'model'"):
        ResumableCheckpoint(filename="model")
    for options in ({"monitor": "val/loss"}, {"save_top_k": 0}):
        with pytest.raises(ValueError, match=r"save_last: expected link or true, .* got None"):
            ResumableCheckpoint(save_last=None, **options)


def test_monitored_figures_are_of_validation() -> None:
    with pytest.raises(ValueError, match=r"expected a validation metric, such as val/loss, got 'train/loss'"):
        ResumableCheckpoint(monitor="train/loss")


def test_terminated_run_says_so_by_its_status(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, Interrupt("on_before_backward", 5, terminate))
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_validation_batch_start", "on_train_start"])
def test_terminated_before_the_first_step(hook: str, tmp_path: Path) -> None:
    class Terminate(pl.Callback):
        pass

    setattr(Terminate, hook, lambda *_: terminate())
    train(tmp_path, max_steps=2)
    resumed = {"ckpt_path": tmp_path / "step=2.ckpt"} if hook == "on_train_start" else {}  # without a sanity check
    for options in ({}, resumed):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path, Terminate(), num_sanity_val_steps=2, **options)
        assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_workers_outlive_sigterm(whole: tuple, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, Interrupt("on_before_backward", 5, terminate_all), num_workers=1)
    before = train.losses
    losses, _ = train(tmp_path, ckpt_path=newest_checkpoint([tmp_path]))
    assert before | losses == whole[0]
    assert max(before) == 6


def test_workers_outlive_ctrl_c(whole: tuple, tmp_path: Path) -> None:
    """Which reaches them, too; it is for the training process to end them."""

    def interrupt_workers() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
            worker.join(0.2)
            assert worker.is_alive()

    losses, _ = train(tmp_path, Interrupt("on_before_backward", 5, interrupt_workers), num_workers=1)
    assert losses == whole[0]


def test_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(5)}, path)
    real = torch.save

    def disk_fills(value: object, file: object) -> None:
        real(torch.ones(3), file)
        raise OSError(errno.ENOSPC, "No space left on device")

    def disk_breaks(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_fills)
        with pytest.raises(OSError, match=r"a\.ckpt: cannot be written \(.*No space left on device\); make room"):
            AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(5)}, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_breaks)
        with pytest.raises(OSError, match=r"a\.ckpt: cannot be written \(.*Input/output error\); check the folder"):
            AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(5)}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert AtomicCheckpointIO().load_checkpoint(path)["x"].sum() == 5


def test_run_whose_disk_fills_goes_on(whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, real = [], torch.save

    def disk_fills(value: object, file: object) -> None:
        saves.append(value)
        if len(saves) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_fills)
        with pytest.raises(OSError, match="make room"):
            train(tmp_path, every=1)
    before = train.losses
    path = newest_checkpoint([tmp_path])
    assert path.name == "step=2.ckpt"
    losses, weights = train(tmp_path, ckpt_path=path)
    assert before | losses == whole[0]
    torch.testing.assert_close(weights, whole[1], rtol=0, atol=0)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    message = r"tokens: cannot be written \(.*No space left on device\); make room; what was"
    with pytest.raises(OSError, match=message), atomic_write(tmp_path / "tokens"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(OSError, match=r"tokens: cannot be written \(.*No such file"),
        atomic_write(tmp_path / "no/tokens"),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="book"), atomic_write(tmp_path / "tokens"):
        (tmp_path / "book").read_text()
    assert not list(tmp_path.iterdir())


def test_a_folder_stands_until_the_new_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two renames, and then again."""
    for name in ("last-before.ckpt", "last.ckpt.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.pt").write_text(name)
    new, path, rename = tmp_path / "last.ckpt.tmp", tmp_path / "last.ckpt", Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: fail() if self == new else rename(self, target))
    with pytest.raises(OnPurposeError):
        replace_folder(new, path)
    assert (tmp_path / "last-before.ckpt/meta.pt").exists()
    monkeypatch.undo()
    for _ in range(2):  # the second over a file
        replace_folder(new, path)
        assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
        path.rename(new)
        path.write_text("a file")


def test_file_size_limit_is_met_by_the_real_writer(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(5)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"a\.ckpt: cannot be written \(.*File too large\)"):
            AtomicCheckpointIO().save_checkpoint({"x": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == [path]
    assert AtomicCheckpointIO().load_checkpoint(path)["x"].sum() == 5


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"lr_schedulers": [], "harm": Harmful()}, "runs.ckpt")
    with pytest.raises(ValueError, match="expected a whole checkpoint of plain values"):
        AtomicCheckpointIO().load_checkpoint("runs.ckpt")
    with pytest.raises(ValueError, match="weights_only: expected true"):
        AtomicCheckpointIO().load_checkpoint("runs.ckpt", weights_only=False)
    with (
        pytest.warns(UserWarning, match=r"last skips .*runs\.ckpt"),
        pytest.raises(ValueError, match=r"a whole checkpoint, got 1 that cannot be read, .*runs\.ckpt; restore"),
    ):
        newest_checkpoint([tmp_path])
    with pytest.raises(ValueError, match="expected a whole checkpoint"):
        build_cli(["fit", "--ckpt_path=runs.ckpt"])
    assert not Path("harm").exists()


def cli(*args: str) -> DMACLI:
    """Run `fit` with the small model of the kill script."""
    return build_cli(["fit", *SMALL, "--checkpoint.every_n_train_steps=2", *args])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a run of four steps and its continuation to step six have left two versions."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["dma-lightning"])
        for steps in (4, 6):
            done = cli("--ckpt_path=last", f"--trainer.max_steps={steps}", "--model.schedule=constant")
            assert done.trainer.global_step == steps
            done.trainer.strategy.teardown()
    return folder


def steps_of(folder: Path) -> list[str]:
    return sorted(f"{file.parents[1].name}/{file.name}" for file in folder.rglob("*.ckpt") if not file.is_symlink())


def copy(source: Path, target: Path) -> Path:
    """Copy a folder, with the time stamps of its files."""
    import shutil

    return Path(shutil.copytree(source, target, symlinks=True))


@pytest.fixture
def copied(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `runs` as the working folder."""
    monkeypatch.chdir(copy(runs, tmp_path / "copy"))
    return tmp_path / "copy"


def resolved(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[DMACLI, str]:
    """Run `fit` without a further step; the command line, with its checkpoint, and what was printed."""
    done = cli("--trainer.max_steps=4", *args)
    return done, capsys.readouterr().out


def test_last_looks_over_all_versions(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps_of(copied) == [f"version_{x}.ckpt" for x in ("0/step=2", "0/step=4", "1/step=5", "1/step=6")]
    newest = copied / "runs/killed/version_1/checkpoints/step=6.ckpt"
    done, printed = resolved(capsys, "--ckpt_path=last", "--trainer.max_steps=7")
    assert done.checkpoint == newest
    assert f"ckpt_path last: {newest}" in printed
    saved = yaml.safe_load((copied / "runs/killed/version_2/config.yaml").read_text())
    assert saved["ckpt_path"] == "last"  # so that the saved configuration goes on with the newest, too


def test_last_needs_no_link(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for link in copied.rglob("last.ckpt"):
        link.unlink()
    assert resolved(capsys, "--ckpt_path=last")[0].checkpoint.name == "step=6.ckpt"


@pytest.mark.parametrize("damage", ["truncated", "empty", "weights only", "dangling"])
def test_damaged_checkpoint_is_left_out(damage: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = copied / "runs/killed/version_1/checkpoints/step=6.ckpt"
    (newest.parent / "step=5.ckpt").unlink()  # so that the one before is of another version
    content = newest.read_bytes()
    if damage == "dangling":
        newest.unlink()  # the link points nowhere
    elif damage == "weights only":
        torch.save({"state_dict": {}}, newest)
    else:
        newest.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    if damage in ("truncated", "empty"):
        with pytest.warns(UserWarning, match=r"last skips .*step=6\.ckpt: expected a whole"):
            done, _ = resolved(capsys, "--ckpt_path=last")
        with pytest.raises(ValueError, match=r"expected a whole checkpoint, got .*`last` takes the newest"):
            cli(f"--ckpt_path={newest}")
    else:
        done, _ = resolved(capsys, "--ckpt_path=last")
    assert done.checkpoint.name == "step=4.ckpt"


def test_no_run_begins_anew_beside_damaged_checkpoints(copied: Path) -> None:
    for file in copied.rglob("*.ckpt"):
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="last skips"),
        pytest.raises(ValueError, match=r"expected a whole checkpoint, got 4 that cannot be read, the newest .*\.ckpt"),
    ):
        cli("--ckpt_path=last")


def test_last_in_a_config(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("resume.yaml").write_text("ckpt_path: last\n")
    done, _ = resolved(capsys, "--config=resume.yaml")
    assert done.checkpoint.name == "step=6.ckpt"
    # What the command line does not say comes from the checkpoint.
    assert done.model.hparams.schedule == "constant"


def test_command_line_wins_over_the_last(copied: Path) -> None:
    flags = ["--model.lr=0.25", "--model.keep_window_size=3", "--model.backend=reference"]
    done = cli("--ckpt_path=last", "--trainer.max_steps=7", *flags)
    assert done.trainer.global_step == 7
    assert (done.model.hparams.lr, done.model.hparams.schedule) == (0.25, "constant")
    assert done.model.model.config.keep_window_size == 3
    assert done.model.model.config.backend == "reference"
    assert [group["lr"] for group in done.trainer.optimizers[0].param_groups] == [0.25, 0.25]


def test_last_of_another_attention_is_refused(copied: Path) -> None:
    with pytest.raises(ValueError, match=r"expected attention 'dma' as in .*, got 'mha'; give each"):
        cli("--ckpt_path=last", "--model.attention=mha")


def test_a_finished_run_says_that_nothing_is_to_do(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli("--ckpt_path=last", "--trainer.max_steps=6", "--trainer.callbacks+=dma_lightning.callbacks.FitReport")
    assert "nothing to do: 6 of 6 steps are done; raise trainer.max_steps" in capsys.readouterr().out


def test_nothing_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="ckpt_path: expected a checkpoint below runs/killed, got none"):
        build_cli(["validate", *SMALL, "--ckpt_path=last"])
    done, printed = resolved(capsys, "--ckpt_path=last")
    assert done.checkpoint is None
    assert "ckpt_path last: no checkpoint below runs/killed; training starts from scratch" in printed


TENSORBOARD = ["--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.name=it"]


def curves(version: Path) -> dict[str, list[tuple[int, float]]]:
    """All figures that a run has logged."""
    events = EventAccumulator(str(version)).Reload()
    names = set(events.Tags()["scalars"]) - {"hp_metric"}
    return {name: [(x.step, x.value) for x in events.Scalars(name)] for name in names}


def logged(folder: str, *args: str, logger: list[str] = TENSORBOARD) -> Path:
    """Start or continue a run; the folder of its logger."""
    place = ["--trainer.log_every_n_steps=1", "--model.schedule=constant", "--ckpt_path=last"]
    done = cli(*logger, f"--trainer.logger.save_dir={folder}", *place, *args)
    done.trainer.strategy.teardown()
    return Path(done.trainer.log_dir)


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder for runs. Their warnings are errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dma-lightning"])
    filters = [("ignore", "The dataloader, .*_dataloader", UserWarning, None, 0), ("error", None, UserWarning, None, 0)]
    monkeypatch.setattr("warnings.filters", [*filters, ("ignore", None, Warning, None, 0)])
    # TensorBoard reads the files that a process makes within a second in the order of their numbers' text: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    return tmp_path


def test_an_interrupted_run_is_one_run_in_tensorboard(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = curves(logged("whole", "--trainer.max_steps=10"))
    folder = logged("parts", "--trainer.max_steps=6", "--checkpoint.save_top_k=-1")
    for lost in (5, 6):  # so that what was logged of these steps is computed again
        (folder / f"checkpoints/step={lost}.ckpt").unlink()
    with monkeypatch.context() as patch:
        stop = lambda self, *_: terminate() if self.global_step == 5 else None  # noqa: E731
        patch.setattr(LanguageModel, "on_train_batch_start", stop, raising=False)
        with pytest.raises(SystemExit):
            logged("parts", "--trainer.max_steps=10")
    assert logged("parts", "--trainer.max_steps=10") == folder
    parts = curves(folder)
    assert parts == whole
    assert [step for step, _ in parts["train/loss"]] == list(range(10))
    (link,) = (file for file in (folder / "checkpoints").iterdir() if file.is_symlink())
    assert (link.name, link.resolve().name) == ("last.ckpt", "step=10.ckpt")
    assert steps_of(folder) == [
        f"version_0/step={step}.ckpt" for step in (10, 2, 6, 8)
    ]  # 2 was saved to stay; 6 was gone on from
    configs = {file.name for file in folder.glob("config*")}
    assert configs == {"config.yaml", "config_from_step_4.yaml", "config_from_step_6.yaml"}


def test_the_checkpoint_gone_on_from_stays_behind_links(working_folder: Path) -> None:
    Path("scratch").mkdir()
    Path("runs").symlink_to("scratch")
    logged("runs", "--trainer.max_steps=2")
    folder = logged("runs", "--trainer.max_steps=8")
    assert {file.name for file in (folder / "checkpoints").glob("[!.]*")} == {
        "last.ckpt",
        *(f"step={step}.ckpt" for step in (2, 6, 8)),
    }


def test_a_run_goes_on_in_another_precision(working_folder: Path) -> None:
    for steps, precision in ((2, "bf16-mixed"), (4, "32-true"), (6, "bf16-mixed")):
        folder = logged("runs", f"--trainer.max_steps={steps}", f"--trainer.precision={precision}")
    assert [step for step, _ in curves(folder)["train/loss"]] == list(range(6))


def test_a_finished_run_keeps_its_figures(working_folder: Path) -> None:
    figures = ["--trainer.max_steps=4", "--trainer.callbacks+=dma_lightning.monitoring.FinalMetrics"]
    folder = logged("runs", *figures)
    before = curves(folder)
    assert "final/loss" in before
    assert logged("runs", *figures) == folder
    assert curves(folder) == before


def test_a_version_that_is_named_is_a_run_of_its_own(working_folder: Path) -> None:
    first, *others = (logged("runs", "--trainer.max_steps=2", f"--trainer.logger.version={x}") for x in ("a", "b", "a"))
    assert [first, *others] == [Path("runs/it", name) for name in ("a", "b", "a")]


@pytest.mark.parametrize("option", ["--trainer.logger=false", "--trainer.logger.version=mine"])
def test_a_run_without_a_checkpoint_yet_begins_again_where_it_was(option: str, working_folder: Path) -> None:
    def start(*args: str) -> None:
        logger = [option] if option.endswith("false") else [*TENSORBOARD, option]
        cli(*logger, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", lambda *_: fail())
        patch.setattr(UnstartedRuns, "clean", lambda _: None)  # a killed process does not
        for _ in range(3):  # with the configuration of an earlier attempt, and that of an attempt after it
            with pytest.raises(OnPurposeError):
                start("--ckpt_path=last")
    start("--ckpt_path=last")
    assert {file.name for file in working_folder.rglob("config*")} == {"config.yaml", "config_from_step_0.yaml"}
    with pytest.raises(ValueError, match=r"config\.yaml: expected no file of another run, got one; name another"):
        start()


class PlainLogger(CSVLogger):
    """A logger without arguments."""

    def __init__(self) -> None:
        super().__init__("logs")


def test_a_logger_without_arguments_has_a_last(working_folder: Path) -> None:
    warnings.filterwarnings("ignore", "The dirpath has changed")
    for steps in (2, 4):
        run = ["--trainer.log_every_n_steps=1", f"--trainer.max_steps={steps}", "--ckpt_path=last"]
        done = build_cli(["fit", *kill_runs.OPTIONS[:-1], "--trainer.logger=test_interruption.PlainLogger", *run])
        done.trainer.strategy.teardown()
    assert done.checkpoint.name == "step=2.ckpt"


def test_all_that_an_optimizer_has_may_change(working_folder: Path) -> None:
    logged("runs", "--trainer.max_steps=2")
    changed = ["--trainer.max_steps=4", "--model.weight_decay=0.5", "--model.betas=[0.5,0.25]"]
    run = ["--trainer.logger.save_dir=runs", "--trainer.log_every_n_steps=1", "--ckpt_path=last"]
    done = cli(*TENSORBOARD, *run, *changed)
    assert done.checkpoint.name == "step=2.ckpt"
    groups = done.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [group["betas"] for group in groups] == [(0.5, 0.25)] * 2


def test_runs_without_a_logger_go_on(working_folder: Path) -> None:
    for steps in (2, 4):
        done = cli("--trainer.logger=false", f"--trainer.max_steps={steps}", "--ckpt_path=last")
        done.trainer.strategy.teardown()
    assert done.checkpoint.name == "step=2.ckpt"


def test_folders_that_some_callbacks_name_are_not_all(working_folder: Path) -> None:
    other = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    options = ["--trainer.callbacks.dirpath=other", "--trainer.callbacks.every_n_epochs=99"]
    for _ in range(2):
        folder = logged("runs", "--trainer.max_steps=2", other, *options)
    assert folder.name == "version_0"


def test_no_progress_bar_where_none_is_asked_for(working_folder: Path) -> None:
    bar = ["--trainer.callbacks+=dma_lightning.monitoring.ProgressBar", "--trainer.enable_progress_bar=false"]
    assert logged("runs", "--trainer.max_steps=2", *bar).name == "version_0"


def test_a_null_on_the_command_line_begins_anew(working_folder: Path) -> None:
    logged("runs", "--trainer.max_steps=2")
    assert logged("runs", "--trainer.max_steps=2", "--ckpt_path=null").name == "version_1"


def test_what_is_not_among_the_best_is_saved_as_the_last(whole: tuple, tmp_path: Path) -> None:
    class Falling(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("val/falling", -float(trainer.global_step))

    def run(steps: int, **options: object) -> dict[int, float]:
        best = {"monitor": "val/falling", "mode": "max", "save_top_k": 2}  # of the figures, not of steps between them
        saving = ResumableCheckpoint(1, dirpath=tmp_path / "monitored", **best)
        train(tmp_path / "other", Falling(), saving, max_steps=steps, **options)
        return train.losses

    before = run(5)
    path = newest_checkpoint([tmp_path / "monitored"])
    assert {file.name for file in path.parent.glob("[!.]*")} == {"step=2.ckpt", "step=4.ckpt", "last.ckpt"}
    assert (path.name, torch.load(path, weights_only=True)["global_step"]) == ("last.ckpt", 5)
    assert before | run(STEPS, ckpt_path=path) == whole[0]
    assert {file.name for file in path.parent.glob("[!.]*")} == {"step=2.ckpt", "step=4.ckpt", "last.ckpt"}


def test_validations_between_checkpoints_save_nothing_if_told_so(whole: tuple, tmp_path: Path) -> None:
    folder = tmp_path / "rare"
    saving = ResumableCheckpoint(3, dirpath=folder, save_top_k=-1, save_on_validation_end=False)
    train(tmp_path / "other", saving)  # validations after every second step
    steps = {*range(3, STEPS + 1, 3), STEPS}
    assert {file.name for file in folder.glob("[!.]*")} == {"last.ckpt", *(f"step={step}.ckpt" for step in steps)}
    for step in (3, 6):
        losses, weights = train(tmp_path / f"from_{step}", ckpt_path=folder / f"step={step}.ckpt")
        assert losses == {batch: loss for batch, loss in whole[0].items() if batch > 2 * step}
        torch.testing.assert_close(weights, whole[1], rtol=0, atol=0)


def test_killed_runs_are_the_uninterrupted_run(tmp_path: Path) -> None:
    # In a process of its own: autograd refuses to run in forks of one in which it has started threads.
    kinds = ["mqar", "text", "processes"]  # `tests/lightning/context` kills the fourth
    command = [sys.executable, kill_runs.__file__, "--kills=2", "--steps=20", "--kinds", *kinds]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, f"--out={tmp_path}/kills.json"], env=paths, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert {kind: sum(len(run["kills"]) for run in found[kind]["runs"]) for kind in found} == dict.fromkeys(kinds, 2)
