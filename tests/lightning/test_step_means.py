"""A step's gradient and loss are those of the mean over all of its labels, as if it were one large batch.

`test_processes.py` tests this for several processes, with unequal numbers of labels.
"""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from test_metrics import quiet_trainer, small_model
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from dma_lightning import LanguageModel
from dma_lightning.callbacks import GradientGuard
from dma_lightning.data import IGNORE_INDEX


class Labeled(Dataset):
    """Sequences with given numbers of labels."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 64, (33,), generator=torch.Generator().manual_seed(index))
        labels = ids[1:].clone()
        labels[self.labels[index] :] = IGNORE_INDEX
        return {"input_ids": ids[:-1], "labels": labels, "label_bytes": torch.tensor(3 * self.labels[index])}


class Steps(pl.Callback):
    """Records the gradient and the logged figures of each step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.figures: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.figures.append({name: x for name, x in trainer.callback_metrics.items() if name.startswith("train/")})


def steps(labels: list[int], batch_size: int, accumulate: int, *callbacks: pl.Callback, **options: object) -> Steps:
    """Train one epoch without changing any weight."""
    torch.manual_seed(0)
    found = Steps()
    trainer = quiet_trainer(
        max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[found, *callbacks], log_every_n_steps=1, **options
    )
    trainer.fit(small_model(lr=1e-300), DataLoader(Labeled(labels), batch_size=batch_size))
    return found


@pytest.mark.parametrize("labels", [(32, 1, 32, 5), (32, 0, 0, 0), (0, 0, 0, 7), (32, 32, 32, 32)])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_are_one_large_batch(labels: tuple[int, ...], accumulate: int) -> None:
    one = steps(list(labels), 4, 1, precision="64-true")
    several = steps(list(labels), 4 // accumulate, accumulate, precision="64-true")
    torch.testing.assert_close(several.gradients, one.gradients, rtol=0, atol=1e-10)
    assert one.gradients[0].norm() > 0.1
    torch.testing.assert_close(several.figures, one.figures, rtol=1e-6, atol=0)
    assert set(one.figures[0]) == {"train/loss", "train/perplexity", "train/bits_per_byte"}


@pytest.mark.parametrize("accumulate", [2, 8])
def test_the_incomplete_group_at_an_epochs_end(accumulate: int) -> None:
    labels = [4, 32, 9, 1, 17, 30, 2, 31, 12]
    last = steps(labels, 1, accumulate, precision="64-true")
    alone = steps(labels, 1, 1, precision="64-true")
    torch.testing.assert_close(last.gradients[-1], alone.gradients[-1], rtol=0, atol=1e-10)
    assert last.figures[-1] == alone.figures[-1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_labels_is_a_step_with_zero_gradients(accumulate: int) -> None:
    guard = GradientGuard(spike="stop", window=1)
    found = steps([32, 16, 0, 0, 32, 16], 2 // accumulate, accumulate, guard)
    assert len(found.gradients) == 3
    assert found.gradients[1].abs().max() == 0
    assert found.figures[1]["train/loss"] == 0
    assert guard.state_dict()["count"] == 1  # of the last steps that say something; 0 would make the next a jump


def test_unequal_batches_are_no_jump_of_the_loss() -> None:
    """With a step of 2 labeled sequences of 8, weighing batches equally would make the others four times as large."""
    guard = GradientGuard(spike="stop", window=1, spike_factor=1.5)
    labels = [32, 0, 0, 0, 0, 0, 0, 32] + [32] * 8
    found = steps(labels, 2, 4, guard)
    assert guard.state_dict()["mean"] == pytest.approx(found.figures[-1]["train/loss"].item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision(precision: str) -> None:
    """Sums over many labels neither overflow nor lose more than rounding."""
    labels = [32, 1, 0, 20]
    one, several = steps(labels, 4, 1, precision=precision), steps(labels, 1, 4, precision=precision)
    (expected,), (gradient,) = one.gradients, several.gradients
    assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The learning rate of each step, including the steps of a learning-rate finder, which skips callbacks."""
    found: list[float] = []

    def record(module: LanguageModel, optimizer: Optimizer) -> None:
        found.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(LanguageModel, "on_before_optimizer_step", record)
    monkeypatch.chdir(tmp_path)  # where finders put a checkpoint
    return found


FINDER = {"min_lr": 1e-6, "max_lr": 1.0, "early_stop_threshold": None}


def test_the_tuner_tries_the_rates_that_it_reports(rates: list[float]) -> None:
    trainer, loader = quiet_trainer(max_steps=8), DataLoader(Labeled([32] * 80), batch_size=2)
    module = small_model(lr=3e-3)
    reported = Tuner(trainer).lr_find(module, loader, num_training=20, update_attr=False, **FINDER).results["lr"]
    assert rates == pytest.approx(reported[: len(rates)])
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) > 0.1
    assert module.hparams.lr == 3e-3


def test_a_resumed_run_leaves_the_rates_to_the_finder(rates: list[float]) -> None:
    loader = DataLoader(Labeled([32] * 80), batch_size=2)
    trainer = pl.Trainer(accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False)
    trainer.fit(small_model(lr=3e-3), loader)
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    rates.clear()
    finder = LearningRateFinder(num_training_steps=20, **FINDER)
    quiet_trainer(max_steps=8, callbacks=[finder]).fit(small_model(lr=3e-3), loader, ckpt_path=checkpoint)
    assert rates[:4] == pytest.approx(finder.optimal_lr.results["lr"][:4])
    assert rates[1] < 1e-5


def test_training_begins_with_the_rate_that_was_found(rates: list[float]) -> None:
    finder = LearningRateFinder(num_training_steps=20, **FINDER)
    trainer, loader = quiet_trainer(max_steps=8, callbacks=[finder]), DataLoader(Labeled([32] * 80), batch_size=2)
    trainer.fit(small_model(lr=3e-3), loader)
    suggested = finder.optimal_lr.suggestion()
    assert suggested != 3e-3
    assert rates[-8:] == pytest.approx([suggested] * 8)
