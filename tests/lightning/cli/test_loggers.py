"""Runs with Weights & Biases, and with loggers that use one folder for all runs: started, repeated, and continued."""

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from small_run import DATA, MODEL, TRAINER, cli

from dma_lightning.checkpoints.io import read_checkpoint
from dma_lightning.cli.entry import DMACLI
from dma_lightning.data.restoring import data_arguments
from dma_lightning.monitoring.writer import WandbWriter

RUN = [x for x in TRAINER if not x.startswith("--trainer.logger")]
FIXED = {
    "csv": ["--trainer.logger=CSVLogger", "--trainer.logger.version=", "--trainer.logger.save_dir=logs"],
    "tensorboard": [
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.version=",
        "--trainer.logger.save_dir=logs",
    ],
    "other": ["--trainer.logger=test_loggers.OneFolder"],
}
SERVICE = ["--trainer.logger=test_loggers.Service"]


class OneFolder(Logger):
    """A logger without versions."""

    name, version, save_dir = "lightning_logs", "", "logs"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass


class Service(OneFolder):
    """A logger that gives each run an id when it begins, as services do."""

    begun = 0

    def __init__(self, save_dir: str = "logs", name: str = "lightning_logs", version: str | None = None) -> None:
        super().__init__()
        self.id = version

    @property
    def experiment(self) -> None:
        if self.id is None:
            Service.begun += 1
            self.id = f"run{Service.begun}"

    @property
    def version(self) -> str | None:
        return self.id


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dma-lightning"])
    monkeypatch.setattr(Service, "begun", 0)
    Path("text.txt").write_text("alpha beta gamma delta\n" * 200)


def fit(steps: int, logger: list[str], *args: str) -> DMACLI:
    return cli("fit", *RUN, *logger, *MODEL, *DATA, f"--trainer.max_steps={steps}", *args)


def content() -> dict[Path, bytes]:
    """Every file below the folder of logs, except links."""
    return {x: x.read_bytes() for x in Path("logs").rglob("[!.]*") if x.is_file() and not x.is_symlink()}


def folders() -> dict[str, list[str]]:
    """For each run folder: its configurations, and its checkpoints with their lock."""
    found = sorted({file.parents[1] for file in Path("logs").rglob("*.ckpt")})
    assert all((folder / "checkpoints/.lock").exists() for folder in found)
    names = ("config*", "checkpoints/step*")
    return {f"{x.relative_to('logs')}": sorted(file.name for name in names for file in x.glob(name)) for x in found}


def kept(before: dict[Path, bytes]) -> bool:
    """Whether all files are unchanged."""
    after = content()
    return all(after[path] == written for path, written in before.items())


@pytest.mark.parametrize(
    ("logger", "goes_on_in", "configs"),
    [
        ("csv", "version_1", ["config.yaml"]),  # beside metrics that cannot be added to
        ("tensorboard", "version_0", ["config.yaml", "config_from_step_1.yaml"]),
        ("other", "version_1", ["config.yaml"]),
    ],
)
def test_a_place_without_versions_gives_each_run_a_folder(logger: str, goes_on_in: str, configs: list[str]) -> None:
    fit(2, FIXED[logger])
    fit(1, FIXED[logger])
    before = content()
    done = fit(3, FIXED[logger], "--ckpt_path=last")
    assert (done.checkpoint.name, done.trainer.global_step) == ("step=1.ckpt", 3)
    assert kept(before)
    found = folders()
    assert found["lightning_logs"] == ["config.yaml", "step=1.ckpt", "step=2.ckpt"]
    assert found["lightning_logs/version_0"][:2] == ["config.yaml", "step=1.ckpt"] or logger == "tensorboard"
    assert [x for x in found[f"lightning_logs/{goes_on_in}"] if x.startswith("config")] == configs


def test_one_folder_of_a_logger_is_gone_on_with() -> None:
    for logger in ("tensorboard", "other"):
        fit(1, FIXED[logger])
        before = content()
        fit(2, FIXED[logger], "--ckpt_path=last")
        assert kept(before)
        files = ["config.yaml", "config_from_step_1.yaml", "step=1.ckpt", "step=2.ckpt"]
        assert folders() == {"lightning_logs": files}
        Path("logs").rename(f"logs of {logger}")


def test_a_csv_logger_of_a_named_version_goes_on_below_it() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.version=mine", "--trainer.logger.save_dir=logs"]
    fit(2, logger)
    first = content()
    assert Path("logs/lightning_logs/mine/metrics.csv") in first
    with pytest.raises(ValueError, match=r"mine/config\.yaml: expected no file of another run, got one; name another"):
        fit(2, logger)
    assert content() == first  # nothing is deleted before that is told
    assert fit(3, logger, "--ckpt_path=last").trainer.global_step == 3
    assert kept(first)
    assert list(folders()) == ["lightning_logs/mine", "lightning_logs/mine/version_0"]


def test_a_csv_run_that_was_killed_early_begins_again_where_it_was() -> None:
    Path("logs/lightning_logs").mkdir(parents=True)
    Path("logs/lightning_logs/config.yaml").write_text("of an attempt that got no further\n")
    fit(1, FIXED["csv"], "--ckpt_path=last")
    assert folders() == {"lightning_logs": ["config.yaml", "config_from_step_0.yaml", "step=1.ckpt"]}
    assert Path("logs/lightning_logs/config.yaml").read_text() == "of an attempt that got no further\n"


def test_runs_of_a_service_have_folders_by_their_ids() -> None:
    fit(1, SERVICE)
    fit(1, SERVICE)
    assert folders() == {f"lightning_logs/run{x}": ["config.yaml", "step=1.ckpt"] for x in (1, 2)}
    assert not Path("logs/config.yaml").exists()
    path = Path("logs/lightning_logs/run1/checkpoints/step=1.ckpt")
    assert data_arguments(read_checkpoint(path), path).files == {}  # the configuration beside it confirms them
    fit(2, [*SERVICE, "--trainer.logger.version=run1"], "--ckpt_path=last")  # an id that is named goes on
    configs = ["config.yaml", "config_from_step_1.yaml"]
    assert folders()["lightning_logs/run1"] == [*configs, "step=1.ckpt", "step=2.ckpt"]
    assert len(folders()) == 2


class RecordingWandb(WandbLogger):
    """A stand-in for the wandb package that records its calls."""

    def __init__(self) -> None:
        self.told: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.told.append((step, metrics))


def test_weights_and_biases_is_told_pictures_histograms_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        Image=lambda x: ("image", x), Histogram=lambda np_histogram: ("histogram", *np_histogram),
        Html=lambda page: ("html", page.read()),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    logger = RecordingWandb()
    writer = WandbWriter(logger)
    writer.add_image("a", torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1).expand(3, 2, 5), 3)
    writer.add_histogram("b", torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.bfloat16).float(), 4)
    writer.add_text("c", "<pre>d</pre>", 5)
    (_, image), (_, histogram), text = logger.told
    ((_, pixels),) = image["a"]
    assert (pixels.shape, pixels.dtype.name, pixels[1, 4].tolist()) == ((2, 5, 3), "uint8", [0, 128, 255])
    _, counts, edges = histogram["b"]
    assert (counts.sum(), counts.max(), edges[0], edges[-1]) == (4, 2, 1.0, 4.0)
    assert text == (5, {"c": ("html", "<pre>d</pre>")})


def test_runs_of_weights_and_biases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Offline, with the package itself."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.project=mine"]
    shown = ["DynamicMaskMonitor", "SampleMonitor", "FinalMetrics"]
    monitors = [f"--trainer.callbacks+=dma_lightning.monitoring.{name}" for name in shown]
    summaries = []
    for steps, args in ((1, monitors), (2, ["--ckpt_path=last"])):
        done = fit(steps, logger, "--trainer.val_check_interval=1", *args)
        summaries.append((done.trainer.logger.version, dict(wandb.run.summary)))
        wandb.finish()
    assert done.checkpoint.name == "step=1.ckpt"
    assert sorted(folders()) == sorted(f"mine/{version}" for version, _ in summaries)
    assert all("config.yaml" in files for files in folders().values())
    _, first = summaries[0]
    kinds = {name: first[name]["_type"] for name in ("dma/layer_0/A", "dma/layer_0/scores", "kept/layer_0")}
    assert kinds == {"dma/layer_0/A": "histogram", "dma/layer_0/scores": "histogram", "kept/layer_0": "html-file"}
    assert first["masks/layer_0"]["_type"] == "images/separated"
    assert first["final/loss"] == first["val/loss"]
    media = {file.suffix for file in Path("logs").rglob("media/**/*") if file.is_file()}
    assert media == {".png", ".html"}


@pytest.mark.parametrize(
    ("options", "environment", "place"),
    [
        (["--trainer.logger.name=shown"], {}, "logs/lightning_logs"),
        (["--trainer.logger.name=shown"], {"WANDB_PROJECT": "other"}, "logs/other"),
        (["--trainer.logger.project=mine", "--trainer.logger.id=abc"], {"WANDB_PROJECT": "other"}, "logs/mine/abc"),
    ],
)
def test_where_the_last_of_weights_and_biases_is(
    options: list[str], environment: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=logs"]
    with pytest.raises(ValueError, match=f"expected a checkpoint below {place}, got none"):
        cli("validate", "--trainer.accelerator=cpu", *logger, *options, *DATA, "--ckpt_path=last")


def test_one_line_names_the_monitors_that_a_logger_cannot_show(caplog: pytest.LogCaptureFixture) -> None:
    monitors = [f"--trainer.callbacks+=dma_lightning.monitoring.{x}" for x in ("DynamicMaskMonitor", "SampleMonitor")]
    for logger, told in ((["--trainer.logger=false"], False), (FIXED["csv"], True)):
        fit(1, logger, *monitors)
        lines = [x.getMessage() for x in caplog.records if "cannot show" in x.getMessage()]
        line = "CSVLogger: cannot show histograms of DynamicMaskMonitor, pictures and texts of SampleMonitor; "
        assert lines == [f"{line}TensorBoardLogger and WandbLogger can"] * told


def test_the_first_logger_says_where_a_run_is() -> None:
    """Of several; the others keep their own files, and no files of other runs are deleted."""
    csv = {"save_dir": "csv", "name": "", "version": ""}
    classes = [{"class_path": "test_loggers.Service"}, {"class_path": "CSVLogger", "init_args": csv}]
    Path("two.yaml").write_text(yaml.safe_dump({"trainer": {"logger": classes}}))
    fit(1, ["--config=two.yaml"])
    metrics = Path("csv/metrics.csv").read_text()
    fit(1, ["--config=two.yaml"])
    assert list(folders()) == ["lightning_logs/run1", "lightning_logs/run2"]
    assert Path("csv/metrics.csv").read_text() == metrics
    assert Path("csv/version_0/metrics.csv").exists()
