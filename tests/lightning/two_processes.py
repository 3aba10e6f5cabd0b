"""One of two processes that train together, started by `test_processes.py` with the variables that torchrun sets.

    python two_processes.py FOLDER

Results are written to the folder. The test compares them with those of one process.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.utils.data import Dataset

from dma_lightning import LanguageModel, MQARDataModule
from dma_lightning.callbacks import GradientGuard, MixedWindows
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.data import IGNORE_INDEX
from dma_lightning.distributed import SameCheckpoint
from dma_lightning.strategies import FullyShardedStrategy

STEPS = 20
TOGETHER = "gpu" if torch.cuda.device_count() > 1 else "cpu"  # where two processes train


class Announce(pl.Callback):
    """Announces that a process is training, by writing its id to `rank<i>.txt` in the working folder."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step == 2:
            Path(f"rank{trainer.global_rank}.tmp").write_text(str(os.getpid()))
            Path(f"rank{trainer.global_rank}.tmp").rename(f"rank{trainer.global_rank}.txt")


class OnPurposeError(Exception):
    """Raised to end a run with `TornStrategy`."""


class _EndsAfterWriting(ModelParallelStrategy):
    """Writes the checkpoint of the last step, then fails."""

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: object = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if checkpoint["global_step"] == STEPS:
            self.barrier()
            raise OnPurposeError


class TornStrategy(FullyShardedStrategy, _EndsAfterWriting):
    """FSDP2 that fails before the last checkpoint gets its final name."""


class Late(pl.Callback):
    """Delays each batch of the second process, so that the first one finishes long before it."""

    def on_predict_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_rank == 1:
            time.sleep(4)


class Spoil(pl.Callback):
    """Makes a gradient infinite in step 4, only in the second process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == 3 and self.rank == 1:
            loss.register_hook(lambda grad: grad * float("inf"))


class At(pl.Callback):
    """Does something before a step, counted from 1."""

    def __init__(self, step: int, action: object) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step + 1 == self.step:
            self.action()


class FewerLabels(Dataset):
    """Examples in which some have no labels, and others have one."""

    def __init__(self, examples: Dataset) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.examples[index]
        labeled = (item["labels"] != IGNORE_INDEX).nonzero()
        item["labels"][labeled[index % 4 :]] = IGNORE_INDEX
        return item


class Unequal(MQARDataModule):
    """Training sequences with unequal numbers of labels."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_set = FewerLabels(self.train_set)


def train(
    folder: Path,
    attention: str = "dma",
    accumulate: int = 1,
    processes: int = 1,
    strategy: str | Strategy = "auto",
    ckpt_path: Path | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    accelerator: str = TOGETHER,
    saving: dict[str, object] | None = None,
    **model_options: object,
) -> LanguageModel:
    """Train in float64 on batches of 8 sequences over all processes, with checkpoints after steps 10 and 20."""
    pl.seed_everything(0, verbose=False)
    torch.set_default_dtype(torch.float64)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 64, "max_position_embeddings": 16, "num_key_value_heads": 1, "keep_window_size": 4}
    model = LanguageModel(attention=attention, **sizes, **tokens, **model_options)
    data = Unequal(64, 16, 2, train_examples=168, val_examples=3, batch_size=8 // processes)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=processes,
        strategy=strategy,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        log_every_n_steps=6,
        val_check_interval=13 * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, ResumableCheckpoint(10, dirpath=folder, **saving or {"save_top_k": -1})],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


def main(folder: Path) -> None:
    """Make all runs of two processes. The last one tests how they end."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    together = functools.partial(train, processes=2)
    try:
        together(folder / "none", strategy="ddp", callbacks=(SameCheckpoint(folder / f"{rank}.ckpt"),))
    except ValueError as error:
        (folder / f"checkpoint-{rank}.json").write_text(json.dumps(str(error)))
    for attention in ("dma", "mha"):
        for accumulate in (1, 2):
            name = folder / f"ddp-{attention}-{accumulate}"
            together(name, attention, accumulate, strategy="ddp")
    together(folder / "ddp-resumed", strategy="ddp", ckpt_path=folder / "one-dma-1/step=10.ckpt")
    for accumulate in (1, 2):
        together(folder / f"fsdp-dma-{accumulate}", accumulate=accumulate, strategy=FullyShardedStrategy())
    checkpoint = torch.load(folder / "one-dma-1/step=10.ckpt", weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["fused"] = not group["fused"]  # as a run on another device has saved it
    path = folder / f"fused-{rank}.ckpt"
    torch.save(checkpoint, path)
    together(folder / "fsdp-resumed", strategy=FullyShardedStrategy(), ckpt_path=path)
    together(folder / "fsdp-sharded", strategy=FullyShardedStrategy(save_distributed_checkpoint=True))
    path = folder / "fsdp-sharded/step=10.ckpt"
    together(folder / "fsdp-from-sharded", strategy=FullyShardedStrategy(), ckpt_path=path)
    with contextlib.suppress(OnPurposeError):
        strategy = TornStrategy(save_distributed_checkpoint=True)
        together(folder / "fsdp-torn", strategy=strategy, saving={"save_last": True, "save_top_k": 0})
    muon = functools.partial(together, accumulate=2, optimizer="muon")
    muon(folder / "ddp-muon", strategy="ddp")
    muon(folder / "fsdp-muon-sharded", strategy=FullyShardedStrategy(save_distributed_checkpoint=True))
    path = folder / "fsdp-muon-sharded/step=10.ckpt"
    muon(folder / "fsdp-muon", strategy=FullyShardedStrategy(), ckpt_path=path)
    for other in ("one-dma-1", "fsdp-sharded"):
        try:
            muon(folder / "none", strategy=FullyShardedStrategy(), ckpt_path=folder / other / "step=10.ckpt")
        except ValueError as error:
            (folder / f"{other}-refused-{rank}.json").write_text(json.dumps(str(error)))
    for strategy in ("ddp", FullyShardedStrategy()):
        name = f"guarded-{strategy if isinstance(strategy, str) else 'fsdp'}"
        together(folder / name, strategy=strategy, callbacks=(Spoil(rank), GradientGuard(not_finite="skip")))
    together(folder / "mixed", accumulate=2, strategy="ddp", callbacks=(MixedWindows(share=0.5),))
    dropout = functools.partial(together, strategy="ddp", hidden_dropout=0.2)
    dropout(folder / "dropout")
    dropout(folder / "dropout-resumed", ckpt_path=folder / "dropout/step=10.ckpt")
    if TOGETHER == "gpu":
        together(folder / "ddp-graphs", strategy="ddp", compile_layers=True, cuda_graphs=True)
    torch.compile = functools.partial(torch.compile, backend="eager")  # inductor would take a minute
    recomputed = functools.partial(together, activation_checkpointing=True, loss_chunk=23)
    recomputed(folder / "ddp-compiled", strategy="ddp", compile_layers=True)
    recomputed(folder / "fsdp-compiled", strategy=FullyShardedStrategy())

    for number in (signal.SIGTERM, signal.SIGINT):
        ask = At(5 + rank, functools.partial(os.kill, os.getpid(), number))  # not at the same time
        try:
            together(folder / number.name, strategy="ddp", callbacks=(ask,))
        except SystemExit as stop:
            (folder / f"{number.name}-{rank}.json").write_text(json.dumps(stop.code))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    if TOGETHER == "cpu":  # NCCL would wait for its timeout, which the first run has set
        callbacks = (At(7, lambda: os.kill(os.getpid(), signal.SIGKILL)),) if rank == 1 else ()
        together(folder / "killed", strategy="ddp", callbacks=callbacks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
