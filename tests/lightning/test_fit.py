"""Whole runs of the command line: curves, checkpoints, the same figure again, and two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dma_lightning import LanguageModel
from dma_lightning.cli import build_cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
TINY = ["-c", "configs/model/tiny.yaml", "-c", "configs/data/pydoc.yaml", "-c", "configs/trainer/cpu.yaml"]
SMALL = ["--model.num_hidden_layers=1", "--model.hidden_size=32", "--model.intermediate_size=32"]
STEPS = 6


def small_run(tmp_path: Path, subcommand: str) -> list[str]:
    """Arguments of a subcommand on a model that takes milliseconds, logging under `tmp_path`."""
    args = [subcommand, *TINY, *SMALL, f"--trainer.logger.init_args.save_dir={tmp_path}"]
    return [*args, f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version folder of a finished `fit`."""
    tmp_path = tmp_path_factory.mktemp("runs")
    args = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        fit(small_run(tmp_path, "fit") + args + ["--trainer.callbacks.init_args.every_n_train_steps=3"])
    return tmp_path / "cpu" / "version_0"


def fit(args: list[str]) -> None:
    """Run without TQDM, which the shipped config names as a callback and the flag above forbids."""
    build_cli([a for a in args if a != "--trainer.enable_progress_bar=false"])


def scalars(folder: Path) -> dict[str, list[float]]:
    """All curves of an event file."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_curve(run: Path) -> None:
    curves = scalars(run)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert len(curves[f"train/{name}"]) == STEPS
        assert len(curves[f"val/{name}"]) == 2
    for name in ("lr-AdamW/pg1", "lr-AdamW/pg2", "grad_norm"):
        assert len(curves[name]) == STEPS
    assert all(math.isfinite(value) for curve in curves.values() for value in curve)
    assert curves["val/bits_per_byte"][-1] == pytest.approx(curves["val/loss"][-1] / math.log(2), rel=1e-5)
    assert curves["val/perplexity"][-1] == pytest.approx(math.exp(curves["val/loss"][-1]), rel=1e-4)
    assert curves["val/loss"][1] < curves["val/loss"][0]
    assert curves["lr-AdamW/pg1"] == pytest.approx([0.004, 0.004, 0.004, 0.004, 0.004, 0.004])
