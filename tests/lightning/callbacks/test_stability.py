"""Steps with a NaN, an infinity or a jump in the loss end the run or are skipped, and are reported."""

import csv
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from dma_lightning import LanguageModel, MQARDataModule
from dma_lightning.callbacks.gradient_guard import GradientGuard, UnstableTrainingError, _Readings
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.data import Batch
from dma_lightning.step_means import StepTotals


class Spoil(pl.Callback):
    """Changes a gradient, or the loss, of some steps (counted from 1) and keeps the weights after every step."""

    def __init__(self, steps: dict[int, float], parameter: str = "model.layers.1.mlp.up_proj.weight") -> None:
        self.steps, self.parameter, self.weights = steps, parameter, []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (factor := self.steps.get(trainer.global_step + 1)) is not None:
            pl_module.get_parameter(self.parameter).grad[0, 0] *= factor

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.weights.append(pl_module.model.embed_tokens.weight.detach().clone())


class Jump(LanguageModel):
    """A model whose loss is multiplied in some steps."""

    jumps: dict[int, float]

    def _loss(self, batch: Batch) -> tuple[Tensor, StepTotals]:
        loss, totals = super()._loss(batch)
        factor = self.jumps.get(self.global_step + 1, 1.0)
        return loss * factor, replace(totals, nats=totals.nats * factor)


def train(*callbacks: pl.Callback, jumps: dict[int, float] | None = None, **options: object) -> pl.Trainer:
    """Train a small model for six steps of one batch."""
    torch.manual_seed(0)
    model = Jump(
        vocab_size=64,
        max_position_embeddings=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        keep_window_size=4,
    )
    model.jumps = jumps or {}
    arguments = {
        "accelerator": "cpu",
        "max_steps": 6,
        "limit_val_batches": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ResumableCheckpoint) for callback in callbacks),
    }
    trainer = pl.Trainer(**(arguments | options), callbacks=list(callbacks))
    trainer.fit(model, MQARDataModule(64, 16, 2, train_examples=80, val_examples=4, batch_size=4))
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_at_the_first_layer_that_is_not_finite(value: float, tmp_path: Path) -> None:
    with pytest.raises(
        UnstableTrainingError,
        match=r"step 3: the gradient of model\.layers\.1\.mlp\.up_proj\.weight is not finite, "
        r"the first in the backward pass of 1 of \d+, and the loss is [\d.]+; stopped",
    ):
        train(Spoil({3: value}), GradientGuard(), ResumableCheckpoint(1, dirpath=tmp_path))
    # What is saved is from before, although the gradients are read a step later.
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


def test_stops_where_the_loss_is_not_finite() -> None:
    with pytest.raises(UnstableTrainingError, match=r"step 2: the gradient of model\.norm\.weight .* loss is nan"):
        train(GradientGuard(), jumps={2: float("nan")})


def test_what_a_step_has_ruined_is_not_validated() -> None:
    class Validated(pl.Callback):
        def on_validation_batch_start(self, *_: object) -> None:
            pytest.fail("is validated")

    guarded = (Validated(), Spoil({2: float("nan")}), GradientGuard())
    with pytest.raises(UnstableTrainingError, match="step 2: the gradient"):
        train(*guarded, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0)


def test_last_step_is_read_too() -> None:
    with pytest.raises(UnstableTrainingError, match="step 6: the gradient"):
        train(Spoil({6: float("nan")}), GradientGuard())


def test_a_gpu_is_waited_for_at_logging_steps_and_checkpoints_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Numbers(_Readings):
        """Readings as they come from a GPU."""

        def values(self) -> list[float]:
            read.append((self.number, trainers[-1].global_step + 1))
            return super().values()

    def take(number: int, loss: Tensor, module: pl.LightningModule) -> Numbers:
        trainers.append(module.trainer)
        return Numbers(*_Readings.take(number, loss, module)[:3], Event())

    class Event:
        def synchronize(self) -> None:
            """Return at once: the values have arrived."""

    read, trainers = [], []
    monkeypatch.setattr("dma_lightning.callbacks.gradient_guard._Readings", Numbers)
    monkeypatch.setattr(Numbers, "take", take)
    train(GradientGuard(), log_every_n_steps=3)
    assert read == [(1, 3), (2, 3), (3, 6), (4, 6), (5, 6), (6, 7)]  # and at the end
    read.clear()
    train(GradientGuard(), ResumableCheckpoint(2, dirpath=tmp_path), log_every_n_steps=5)
    assert read == [(1, 3), (2, 3), (3, 5), (4, 5), (5, 6), (6, 7)]
    with pytest.raises(UnstableTrainingError, match=r"^step 1: the gradient of model\.layers\.1\.mlp\.up_proj"):
        train(Spoil({1: float("nan")}), GradientGuard(), log_every_n_steps=3)
    assert trainers[-1].global_step == 2


def test_skipped_step_changes_nothing(tmp_path: Path) -> None:
    spoil = Spoil({3: float("nan")})
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"step 3: the gradient of .* is left out"):
        trainer = train(spoil, GradientGuard(not_finite="skip"), logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["grad_norm"] == "nan"] == ["2"]
    assert len(rows) == 6
    assert trainer.global_step == 6
    same = [bool((a == b).all()) for a, b in zip(spoil.weights, spoil.weights[1:], strict=False)]
    assert same == [False, True, False, False, False]
    assert spoil.weights[-1].isfinite().all()


def test_skips_in_a_row_end() -> None:
    guard = GradientGuard(not_finite="skip", max_skipped=2)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(
            UnstableTrainingError,
            match=r"step 5: .* stopped after 2 skipped .* let the guard skip more \(max_skipped\)",
        ),
    ):
        train(Spoil({1: float("nan"), 3: float("nan"), 4: float("nan"), 5: float("nan")}), guard)


def test_jump_of_the_loss() -> None:
    message = r"step 4: the loss of [\d.]+ is more than 2\.0 times its mean of [\d.]+; the largest gradient, [\d.]+, "
    with pytest.raises(UnstableTrainingError, match=message):
        train(GradientGuard(spike="stop", window=3), jumps={4: 3.0})
    with pytest.warns(UserWarning, match=message):
        trainer = train(GradientGuard(spike="skip", window=3), jumps={4: 3.0})
    assert trainer.global_step == 6
    train(GradientGuard(spike="stop", window=4), jumps={4: 3.0})  # too early to tell
    train(GradientGuard(window=3), jumps={4: 3.0})  # ignored


def test_mean_of_the_loss_is_of_whole_steps_and_saved() -> None:
    guard = GradientGuard()
    trainer = train(guard, accumulate_grad_batches=3)
    assert guard.state_dict()["mean"] == pytest.approx(trainer.callback_metrics["train/loss"].item(), rel=0.1)
    assert guard.state_dict()["count"] == 6
    again = GradientGuard()
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"not_finite": "ignore"}, "expected not_finite of"),
        ({"spike": "jump"}, "and spike of"),
        ({"spike_factor": 1.0}, "expected spike_factor > 1"),
        ({"window": 0}, "window >= 1"),
        ({"max_skipped": -1}, "max_skipped >= 0"),
    ],
)
def test_values_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientGuard(**arguments)


def test_refuses_a_gradient_scaler() -> None:
    trainer = type("Trainer", (), {"precision": "16-mixed"})()
    with pytest.raises(ValueError, match="expected a precision other than 16-mixed"):
        GradientGuard().on_fit_start(trainer, None)
