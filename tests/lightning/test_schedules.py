"""Learning-rate schedules and metrics."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from small_run import SIZES

from dma_lightning import LanguageModel, MQARDataModule
from dma_lightning.schedules import lr_factor


def test_wsd() -> None:
    factors = [lr_factor("wsd", step, 100, 0.1, 0.2) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([1 - 0.05 * i for i in range(21)])


def test_cosine() -> None:
    factors = [lr_factor("cosine", step, 100, 0.1, 0.2) for step in range(101)]
    assert factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_short_runs_and_steps_beyond_the_end(schedule: str, max_steps: int) -> None:
    assert all(0 <= lr_factor(schedule, step, max_steps, 0.1, 0.2) <= 1 for step in range(10))
    assert lr_factor(schedule, 0, max_steps, 0.1, 0.2) > 0


def test_the_number_of_steps_is_that_of_the_trainer() -> None:
    """To ask Lightning for an estimate would begin the training data before their position is restored."""
    module = LanguageModel(vocab_size=16)
    module._trainer = SimpleNamespace(max_steps=10)  # has no estimated_stepping_batches
    assert module.configure_optimizers()["lr_scheduler"]["interval"] == "step"


def test_constant() -> None:
    assert lr_factor("constant", 5, -1, 0.1, 0.2) == 1


class _Rates(pl.Callback):
    """Records the learning rate of every step, and saves checkpoints within the first and the second epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rates = folder, []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: LanguageModel, optimizer: torch.optim.Optimizer
    ) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step in (3, 8) and not path.exists():  # not within the accumulation of the next step
            trainer.save_checkpoint(path)


def _train(folder: Path, ckpt_path: Path | None = None, **limits: int) -> tuple[list[float], torch.Tensor]:
    """Train; the learning rates of all steps, and a weight at the end. An epoch has 5 steps."""
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=64, max_position_embeddings=16, schedule="cosine", **SIZES)
    data = MQARDataModule(
        vocab_size=64, sequence_length=16, num_pairs=2, train_examples=42, val_examples=4, batch_size=4
    )
    rates = _Rates(folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accumulate_grad_batches=2,
        callbacks=[rates],
        **limits,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return rates.rates, model.model.embed_tokens.weight


def test_a_schedule_goes_by_epochs_where_no_steps_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that goes on within an epoch is the uninterrupted one, bit for bit."""
    rates, weight = _train(tmp_path, max_epochs=2)
    assert len(rates) == 10
    by_steps, same = _train(tmp_path, max_steps=10)
    assert rates == by_steps
    assert torch.equal(weight, same)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")  # which the position in a checkpoint wins over
    for step in (3, 8):
        rest, resumed = _train(tmp_path, tmp_path / f"{step}.ckpt", max_epochs=2)
        assert rest == rates[step:]
        assert torch.equal(resumed, weight)
    longer, _ = _train(tmp_path, tmp_path / "8.ckpt", max_epochs=3)
    assert longer == _train(tmp_path, max_steps=15)[0][8:]
