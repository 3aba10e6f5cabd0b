"""Small trainings with Lightning, by one process or by several that divide sequences."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dma_lightning import LanguageModel, TextDataModule
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.monitoring import ContextMonitor
from dma_lightning.strategies import FullyShardedStrategy

STEPS, SEQUENCES = 8, 4  # in a batch of all processes together
DRIFT = {"drift": "gate", "score_form": "linear", "content": "input", "keep_last": 1, "sinks": 1}
RETENTION = DRIFT | {"retention_weight": 0.5}


class Marked(Dataset):
    """Sequences with padding and several documents. Some sequences have only a few labels."""

    def __init__(self, sequences: Dataset) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.sequences[index]
        tokens = item["input_ids"]
        padding = tokens % 13 == 0
        few = (torch.arange(len(tokens)) % 5 > 0) & (index % 3 == 0)
        labels = item["labels"].masked_fill(padding | few, -100)
        return item | {"labels": labels, "documents": (tokens == ord(" ")).long().cumsum(-1), "padding": padding}


class Unequal(TextDataModule):
    """Text with unequal numbers of labels."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_set, self.val_set = Marked(self.train_set), Marked(self.val_set)


def train(
    folder: Path,
    parts: int = 1,
    groups: float = 1,
    length: int = 16,
    ckpt_path: Path | None = None,
    accumulate: int = 1,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> LanguageModel:
    """Train for 8 steps in float64, with checkpoints after steps 4 and 8. Validation metrics go to a file."""
    pl.seed_everything(0, verbose=False)
    torch.set_default_dtype(torch.float64)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 256, "max_position_embeddings": length, "num_key_value_heads": 1, "keep_window_size": 4}
    model = LanguageModel(**sizes, **tokens, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".A", "drifting.weight")):
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    text = folder.parent / "text.txt"
    data = Unequal(str(text), length, batch_size=int(SEQUENCES / groups), cache_dir=str(folder.parent / "cache"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=round(parts * groups), max_steps=STEPS, accumulate_grad_batches=accumulate,
        strategy="auto" if parts * groups == 1 else FullyShardedStrategy(context_parallel_size=parts),
        gradient_clip_val=0.5, log_every_n_steps=3, val_check_interval=3 * accumulate, check_val_every_n_epoch=None,
        limit_val_batches=3, num_sanity_val_steps=0, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ContextMonitor(), *callbacks, ResumableCheckpoint(4, dirpath=folder, save_top_k=-1)],
        plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt_path)
    if trainer.is_global_zero:
        figures = {name: float(x) for name, x in trainer.callback_metrics.items()}
        (folder / "figures.json").write_text(json.dumps(figures))
    return model
