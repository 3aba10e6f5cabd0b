"""A small run of `fit` with checkpoints, for tests of damaged or wrong checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dma_lightning.cli.default_callbacks import DEFAULT_CALLBACKS
from dma_lightning.cli.entry import DMACLI, build_cli

CHECKPOINTS = "runs/small/version_0/checkpoints"
SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "keep_window_size": 8,
}  # fmt: skip
PLAIN = [f"--{name}=null" for name in DEFAULT_CALLBACKS if name != "checkpoint"]  # nothing is watched
TRAINER = [
    "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1",
    *PLAIN, "--checkpoint.every_n_train_steps=1",
    "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
    "--trainer.logger.save_dir=runs", "--trainer.logger.name=small",
]  # fmt: skip
MODEL = [f"--model.{name}={value}" for name, value in SIZES.items()]
DATA = [
    "--data=dma_lightning.TextDataModule", "--data.path=text.txt", "--data.cache_dir=cache",
    "--data.sequence_length=16", "--data.batch_size=4",
]  # fmt: skip


def make(folder: Path, *args: str) -> None:
    """Train three steps in a working folder. Checkpoints of the last two remain. Additional arguments come last."""
    (folder / "text.txt").write_text("alpha beta gamma delta\n" * 200)
    fit("--trainer.max_steps=3", *MODEL, *DATA, *args)


def cli(subcommand: str, *args: str) -> DMACLI:
    """The command line."""
    return build_cli([subcommand, *args])


def fit(*args: str) -> DMACLI:
    """Run `fit` with the small run's trainer."""
    return cli("fit", *TRAINER, *args)


def validate(checkpoint: Path | str, *args: str) -> DMACLI:
    """Run `validate` on one batch, without a logger."""
    quiet = ["--trainer.logger=false", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    return cli("validate", f"--ckpt_path={checkpoint}", *quiet, "--trainer.enable_progress_bar=false", *args)


def changed(change: Callable[[dict[str, Any]], Any], name: str = "strange.ckpt") -> Path:
    """A copy of the last checkpoint in the working folder, with its content changed by a function."""
    content = torch.load(f"{CHECKPOINTS}/last.ckpt", weights_only=True)
    change(content)
    torch.save(content, name)
    return Path(name)
