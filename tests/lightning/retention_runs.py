"""Runs with a retention loss; as a script, one of two processes, started by `test_retention_runs.py`.

    python retention_runs.py FOLDER

Results are written to the folder. The test compares them with those of one process.
"""

import functools
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from chosen_form import CHOSEN
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from two_processes import TOGETHER, Unequal

from dma_lightning import LanguageModel
from dma_lightning.callbacks import MixedWindows
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.data import IGNORE_INDEX
from dma_lightning.mixers.retention import retention_loss
from dma_lightning.strategies import FullyShardedStrategy

STEPS, CLIP = 4, 1e-3
SIZES = {
    "vocab_size": 128, "max_position_embeddings": 96, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "keep_window_size": 4,
}  # fmt: skip


class Alike(Dataset):
    """A data set that repeats its first example."""

    def __init__(self, examples: Dataset) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.examples[1]


class Recall(Unequal):
    """Sequences with unequal numbers of labels, or identical ones."""

    alike = False

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.alike:
            self.train_set = Alike(self.train_set)


class Norms(pl.Callback):
    """Records gradient norms of contents and of everything else, before and after clipping, and the logged norm."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def _norms(self, module: pl.LightningModule, when: str) -> dict[str, float]:
        squares = {"content": 0.0, "others": 0.0}
        for name, parameter in module.named_parameters():
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            squares["content" if "drifting.weight" in name else "others"] += grad.square().sum().item()
        return {f"{part} {when}": square**0.5 for part, square in squares.items()}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.steps.append(self._norms(pl_module, "before"))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if self.steps and "logged" not in self.steps[-1]:  # a step's last batch
            logged = {"logged": trainer.callback_metrics["grad_norm"].item()}
            self.steps[-1] |= self._norms(pl_module, "after") | logged


class Parts(pl.Callback):
    """Replaces the retention loss of a batch by the mean of its parts' losses, weighted by their labels.

    With it, one process that has all batches of a step at once should get the same result as several batches do.
    """

    def __init__(self, count: int) -> None:
        self.count, self.labels = count, torch.ones(count)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict, *_: object) -> None:
        self.labels = (batch["labels"] != IGNORE_INDEX).sum(1).view(self.count, -1).sum(1)

    def loss(self, q: Tensor, k: Tensor, content: Tensor, nats: Tensor, *others: Any) -> Tensor:
        """Replacement for `retention_loss`, for sequences without documents and padding."""
        *shared, values = others
        parts = zip(*(x.chunk(self.count) for x in (q, k, content, nats, values)), strict=True)
        losses = torch.stack([retention_loss(*part[:4], *shared, part[4]) for part in parts])
        return (losses * self.labels).sum() / self.labels.sum()

    def used(self) -> AbstractContextManager:
        """A context in which `loss` replaces the retention loss, if there are several parts."""
        if self.count == 1:
            return nullcontext()
        return patch("dma_lightning.mixers.dynamic_mask.retention_loss", self.loss)


def train(
    folder: Path,
    accumulate: int = 1,
    processes: int = 1,
    strategy: str | Strategy = "auto",
    parts: int = 1,
    mixed: bool = False,
    alike: bool = False,
    **model: Any,
) -> None:
    """Train four steps in float64, each on 8 sequences in total over all processes and accumulated batches."""
    pl.seed_everything(0, verbose=False)
    torch.set_default_dtype(torch.float64)
    module = LanguageModel(**SIZES | CHOSEN | model)
    data = Recall(128, 96, 4, train_examples=8 * STEPS, batch_size=8 // processes // accumulate)
    data.alike = alike
    in_parts, norms = Parts(parts), Norms()
    trainer = pl.Trainer(
        accelerator=TOGETHER,
        devices=processes,
        strategy=strategy,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        log_every_n_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            in_parts,
            norms,
            *[MixedWindows(share=0.5, first=0.25, last=0.25)] * mixed,
            ResumableCheckpoint(1, dirpath=folder, save_top_k=-1),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    with in_parts.used():
        trainer.fit(module, data)
    if trainer.is_global_zero:
        (folder / "norms.json").write_text(json.dumps(norms.steps))


BOTH: dict[str, Any] = {"accumulate": 2, "activation_checkpointing": True, "mixed": True}
TOGETHER_RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-accumulated": {"accumulate": 2},
    "ddp-both": BOTH | {"compile_layers": True},
    "ddp-alike": {"alike": True},
    "fsdp": {},
    "fsdp-accumulated": {"accumulate": 2},
    "fsdp-both": BOTH,
}


def main(folder: Path) -> None:
    """Make all runs of two processes."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="eager")
    for name, options in TOGETHER_RUNS.items():
        strategy = "ddp" if name.startswith("ddp") else FullyShardedStrategy()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
            train(folder / name, processes=2, strategy=strategy, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
