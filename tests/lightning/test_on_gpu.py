"""Properties of training on a GPU that tests on a CPU cannot check."""

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import Strategy
from test_processes import assert_same
from two_processes import train

from dma_lightning.cli import build_cli
from dma_lightning.strategies import FullyShardedStrategy
from dma_lightning.trainer_state import is_logging_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _single() -> Iterator[None]:
    """Restore float32 as the default dtype: `train` sets it to float64."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("strategy", ["ddp", FullyShardedStrategy])
@pytest.mark.parametrize("attention", ["dma", "mha"])
def test_one_process_of_nccl_is_the_plain_run(attention: str, strategy: str | type[Strategy], tmp_path: Path) -> None:
    train(tmp_path / "plain", attention, accelerator="gpu")
    strategy = strategy if isinstance(strategy, str) else strategy()
    train(tmp_path / "nccl", attention, accelerator="gpu", strategy=strategy)
    assert torch.distributed.get_backend() == "nccl"
    plain, nccl = (
        torch.load(tmp_path / run / "step=20.ckpt", map_location="cpu", weights_only=True) for run in ("plain", "nccl")
    )
    assert_same(nccl, plain)


class NoWaiting(pl.Callback):
    """Turns waiting for the GPU into an error in steps that do not log, including their hooks."""

    def __init__(self) -> None:
        self.steps, self.patch = 0, pytest.MonkeyPatch()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step >= 2 and not is_logging_step(trainer, before_step=True):  # the first compile kernels
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")  # which passes over waiting for an event
            self.patch.setattr(torch.cuda.Event, "synchronize", lambda _: pytest.fail("waits for an event"))

    def on_train_batch_end(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.patch.undo()


def fit(tmp_path: Path, callbacks: list[pl.Callback], *args: str) -> pl.Trainer:
    """Train the tiny model with the configuration for GPUs."""
    layers = [f"--config={CONFIGS / name}.yaml" for name in ("model/tiny", "data/mqar", "trainer/gpu")]
    flags = {"max_steps": 12, "log_every_n_steps": 5, "limit_val_batches": 0, "devices": 1}
    options = [f"--trainer.{name}={value}" for name, value in flags.items()]
    cli = build_cli([*layers, *options, f"--trainer.logger.init_args.save_dir={tmp_path}", *args], run=False)
    cli.trainer.callbacks += callbacks
    try:
        cli.trainer.fit(cli.model, cli.datamodule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return cli.trainer


@pytest.mark.parametrize("attention", ["dma", "mha"])
def test_nothing_waits_for_the_gpu_between_logging_steps(attention: str, tmp_path: Path) -> None:
    watch = NoWaiting()
    fit(tmp_path, [watch], f"--model.attention={attention}")
    assert watch.steps == 7


GATES = ["--model.drift=gate", "--model.memory_heads=1", "--model.content=input", "--model.retention_weight=0.1"]


@pytest.mark.parametrize(
    "attention",
    [["dma"], ["mha"], ["dma", "--model.keep_window_size=16", *GATES], ["swa", "--model.drift=gate"]],
    ids=["dma", "mha", "gates", "gated window"],
)
def test_compiled_layers_train_as_written_ones_do(attention: list[str], tmp_path: Path) -> None:
    def last_loss(*options: str) -> float:
        trainer = fit(tmp_path, [], f"--model.attention={attention[0]}", *attention[1:], *options)
        return trainer.callback_metrics["train/loss"].item()

    written, compiled = last_loss(), "--model.compile_layers=true"
    assert last_loss(compiled, "--model.activation_checkpointing=true") == pytest.approx(written, rel=0.03)
    graphs = last_loss(compiled, "--model.cuda_graphs=true")
    assert graphs == pytest.approx(written, rel=0.03)
    one = ["--trainer.strategy=ddp", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=6"]
    assert last_loss(compiled, "--model.cuda_graphs=true", *one) == pytest.approx(graphs, rel=1e-3)


def test_mixed_windows_in_cuda_graphs(tmp_path: Path) -> None:
    def last_loss(*options: str) -> float:
        mixed = "--trainer.callbacks+=dma_lightning.callbacks.MixedWindows"
        trainer = fit(tmp_path, [], mixed, "--trainer.callbacks.share=0.5", "--model.keep_window_size=16", *options)
        return trainer.callback_metrics["train/loss"].item()

    graphs = ["--model.compile_layers=true", "--model.cuda_graphs=true"]
    assert last_loss(*graphs) == pytest.approx(last_loss(), rel=0.01)
