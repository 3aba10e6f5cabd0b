"""A small run of earlier code, in `made_before`: its checkpoint and configuration, and the figures it got from them.

The code of commit d2a2f4d made it, checked out to $OLD; this file uses only what that code and today's both offer:

    PYTHONPATH=$OLD:$OLD/flex:$OLD/kernels python tests/lightning/old_run.py tests/lightning/made_before
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers

from dma_lightning.cli import build_cli, main

FOLDER = Path(__file__).parent / "made_before"
STEPS, MORE_STEPS = 7, 12  # an epoch has 10; no validation is due at step 7
CHECKPOINT = f"checkpoints/step={STEPS}.ckpt"  # beside config.yaml, as `fit` leaves them
VOCABULARY = 32
MODEL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "keep_window_size": 4, "hidden_dropout": 0.1,
}  # fmt: skip
DATA = {
    "vocab_size": VOCABULARY, "sequence_length": 16, "num_pairs": 2, "batch_size": 8,
    "train_examples": 80, "val_examples": 40, "test_examples": 40,
}  # fmt: skip
CONFIG = """\
trainer:
  accelerator: cpu
  val_check_interval: 3
  check_val_every_n_epoch: null
  num_sanity_val_steps: -1
  gradient_clip_val: 1.0
  log_every_n_steps: 1
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: before, default_hp_metric: false}
  callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: dma_lightning.monitoring.SpeedMonitor
    - class_path: dma_lightning.monitoring.DynamicMaskMonitor
    - class_path: dma_lightning.monitoring.SampleMonitor
    - class_path: dma_lightning.monitoring.FinalMetrics
    - class_path: dma_lightning.monitoring.RunSummary
    - class_path: dma_lightning.monitoring.ProgressBar
    - class_path: dma_lightning.stability.GradientGuard
    - class_path: dma_lightning.checkpoints.ResumableCheckpoint
      init_args: {every_n_train_steps: 5}
    - class_path: dma_lightning.callbacks.FitReport
      init_args: {metric: val/accuracy}
"""


def train() -> Path:
    """Make the run below the working folder; its version folder."""
    Path("trainer.yaml").write_text(CONFIG)
    options = [f"--model.{name}={value}" for name, value in MODEL.items()]
    options += ["--data=dma_lightning.MQARDataModule", *(f"--data.{name}={value}" for name, value in DATA.items())]
    build_cli(["fit", "--config=trainer.yaml", f"--trainer.max_steps={STEPS}", *options])
    return Path("runs/before/version_0")


def validated(run: Path) -> dict[str, float]:
    """Figures of `validate`, by name."""
    cli = build_cli(
        ["validate", f"--ckpt_path={run / CHECKPOINT}", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    )
    return {name: value.item() for name, value in sorted(cli.trainer.callback_metrics.items())}


def resumed(run: Path) -> dict[str, dict[str, float]]:
    """Resume from the checkpoint below the working folder; training and validation losses by step."""
    files = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / CHECKPOINT}"]
    cli = build_cli(["fit", *files, f"--trainer.max_steps={MORE_STEPS}"])
    events = EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    return {name: {f"{x.step}": x.value for x in events.Scalars(name)} for name in ("train/loss", "val/loss")}


def generated(run: Path) -> str:
    """What `generate` prints, with a tokenizer beside a copy of the checkpoint in the working folder."""
    shutil.copy(run / CHECKPOINT, "copy.ckpt")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("tokenizer.json")
    options = ["--ckpt_path=copy.ckpt", "--prompt=w3 w20 w5 w17 w9", "--max_new_tokens=8", "--temperature=0"]
    argv = ["dma-lightning", "generate", *options, "--device=cpu"]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()) as text:
        main()
    return text.getvalue()


def _make(target: Path) -> None:
    """Train, and keep checkpoint, configuration and figures."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = train()
        (target / CHECKPOINT).parent.mkdir(parents=True)
        shutil.copy(run / CHECKPOINT, target / CHECKPOINT)
        shutil.copy(run / "config.yaml", target)
        figures = {"validate": validated(run), "resume": resumed(run), "generate": generated(run)}
    (target / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    folder, sys.argv = Path(sys.argv[1]).resolve(), ["dma-lightning"]
    _make(folder)
