"""The order of training data depends only on seed and epoch, and resumes exactly where a checkpoint was made."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import SumMetric

from dma_lightning.cli.prepare import prepare
from dma_lightning.data import (
    IGNORE_INDEX,
    MQARDataModule,
    PreparedDataModule,
    SequenceDataModule,
    TextDataModule,
    base,
)
from dma_lightning.data.samplers import EvalSampler, PaddedDataset, TrainSampler

EXAMPLES, BATCH = 45, 4  # 11 batches an epoch


class InterruptionError(Exception):
    """Raised to interrupt training."""


class SmallModel(pl.LightningModule):
    """Counts the examples that it sees. Its weights depend on their order."""

    def __init__(self, fail_at: int = -1, where: str = "training_step") -> None:
        super().__init__()
        self.embedding, self.fail_at, self.where, self.seen = nn.Embedding(64, 64), fail_at, where, []

    def _maybe_fail(self, where: str) -> None:
        if (
            where == self.where
            and not self.trainer.sanity_checking
            and self.trainer.fit_loop.epoch_loop.total_batch_idx == self.fail_at
        ):
            raise InterruptionError

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self._maybe_fail("training_step")
        loss = nn.functional.cross_entropy(
            self.embedding(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX
        )
        self.seen.append((tuple(batch["input_ids"].flatten().tolist()), loss.item()))
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self._maybe_fail("on_train_batch_end")

    def on_train_epoch_start(self) -> None:
        self._maybe_fail("on_train_epoch_start")

    def on_train_epoch_end(self) -> None:
        self._maybe_fail("on_train_epoch_end")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._maybe_fail("validation_step")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def make_mqar(tmp_path: Path, **changed: int) -> MQARDataModule:
    """A few examples."""
    sizes = {"vocab_size": 64, "sequence_length": 16, "num_pairs": 2, "train_examples": EXAMPLES, "val_examples": 3}
    return MQARDataModule(**(sizes | {"batch_size": BATCH} | changed))


def make_text(tmp_path: Path, **changed: int) -> TextDataModule:
    """The same number of windows of text."""
    file = tmp_path / "a.txt"
    file.write_bytes(np.random.default_rng(0).integers(0, 64, EXAMPLES * 8 + 80, dtype=np.uint8).tobytes())
    arguments = {"sequence_length": 8, "batch_size": BATCH, "val_fraction": 0.18, "cache_dir": str(tmp_path / "cache")}
    return TextDataModule(str(file), **(arguments | changed))


def make_mixture(tmp_path: Path, **changed: int) -> PreparedDataModule:
    """About the same number of windows from two folders, in shares that differ from the folders' sizes."""
    for name, windows in (("a", 15), ("b", 30)):
        if not (tmp_path / name).exists():
            text = np.random.default_rng(windows).integers(32, 64, windows * 8 + 80, dtype=np.uint8).tobytes()
            (tmp_path / f"{name}.txt").write_bytes(text)
            prepare(str(tmp_path / f"{name}.txt"), tmp_path / name, processes=1)
    weights = {str(tmp_path / "a"): 0.7, str(tmp_path / "b"): 0.3}
    arguments = {"sequence_length": 8, "batch_size": BATCH, "val_fraction": 0.25}
    return PreparedDataModule(weights, **(arguments | changed))


def fit(
    tmp_path: Path, data: SequenceDataModule, model: SmallModel, ckpt_path: Path | None = None, **options: object
) -> tuple[SmallModel, pl.Trainer]:
    """Train in this process on 30 batches. An interruption leaves a checkpoint."""
    arguments = {
        "max_steps": 30 // options.get("accumulate_grad_batches", 1),
        "check_val_every_n_epoch": None,
        "val_check_interval": 11,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0),
    }
    trainer = pl.Trainer(**(arguments | options))
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model, trainer


def fresh(fail_at: int = -1, where: str = "training_step") -> SmallModel:
    """A model with the same weights every time."""
    torch.manual_seed(0)
    return SmallModel(fail_at, where)


def interrupted(tmp_path: Path, data: SequenceDataModule, fail_at: int, where: str, **options: object) -> Path:
    """The checkpoint that an exception leaves."""
    with pytest.raises(InterruptionError):
        fit(tmp_path, data, fresh(fail_at, where), **options)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    return checkpoint


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("fail_at", "where", "validate_every"),
    [
        (4, "training_step", 11),
        (5, "on_train_batch_end", 11),
        (3, "validation_step", 4),
        (10, "on_train_batch_end", 11),
        (10, "validation_step", 11),
        (10, "on_train_epoch_end", 11),
        (10, "on_train_epoch_start", 11),
        (15, "training_step", 4),
        (23, "validation_step", 4),
        (22, "training_step", 11),
    ],
)
def test_going_on_equals_not_being_interrupted(
    tmp_path: Path, accumulate: int, fail_at: int, where: str, validate_every: int
) -> None:
    """Within the first epoch, at its end, and in the next; in the model's step, and in all that stands around it."""
    make = make_mqar if accumulate == 1 else make_text
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": validate_every}
    model, _ = fit(tmp_path, make(tmp_path), fresh(), **options)
    assert len({seen for seen, _ in model.seen[:11]} ^ {seen for seen, _ in model.seen[11:22]}) > 0
    checkpoint = interrupted(tmp_path, make(tmp_path), fail_at, where, **options)
    resumed, trainer = fit(tmp_path, make(tmp_path), fresh(), checkpoint, **options)
    before = fail_at if where == "training_step" else fail_at + 1
    assert resumed.seen == model.seen[before:]
    assert torch.equal(resumed.embedding.weight, model.embedding.weight)
    assert trainer.global_step == 30 // accumulate


def test_workers_may_change(tmp_path: Path) -> None:
    """They read ahead, which the position does not count; and they draw nothing from the model's random numbers."""
    model, _ = fit(tmp_path, make_text(tmp_path), fresh())
    state = torch.get_rng_state()
    checkpoint = interrupted(tmp_path, make_text(tmp_path, num_workers=2), 14, "training_step")
    resumed, _ = fit(tmp_path, make_text(tmp_path, num_workers=1), fresh(), checkpoint)
    assert resumed.seen == model.seen[14:]
    assert torch.equal(resumed.embedding.weight, model.embedding.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_end_if_the_training_process_was_killed_before_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=os.getppid() + 1))
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))
    with pytest.raises(SystemExit):
        base._begin_worker(0)


def test_twice_interrupted(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, make_mqar(tmp_path), fresh())
    first = interrupted(tmp_path, make_mqar(tmp_path), 5, "training_step").rename(tmp_path / "first")
    resumed = fresh(18, "training_step")  # by Lightning's count, which has the failed batch twice
    with pytest.raises(InterruptionError):
        fit(tmp_path, make_mqar(tmp_path), resumed, first)
    (second,) = tmp_path.glob("*.ckpt")
    assert resumed.seen == model.seen[5:17]
    assert fit(tmp_path, make_mqar(tmp_path), fresh(), second)[0].seen == model.seen[17:]


def test_limited_epochs_go_on_too(tmp_path: Path) -> None:
    options = {"limit_train_batches": 0.5}  # 5 batches
    model, _ = fit(tmp_path, make_mqar(tmp_path), fresh(), **options)
    checkpoint = interrupted(tmp_path, make_mqar(tmp_path), 12, "training_step", **options)
    assert torch.load(checkpoint, weights_only=True)["MQARDataModule"]["position"]["epoch"] == 2
    assert fit(tmp_path, make_mqar(tmp_path), fresh(), checkpoint, **options)[0].seen == model.seen[12:]
    with pytest.raises(ValueError, match=r"expected its 5 batches, got 3; give the same trainer.limit_train_batches"):
        fit(tmp_path, make_mqar(tmp_path), fresh(), checkpoint, limit_train_batches=3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 5}, "as many sequences per step as before, 1 processes x batch_size 4, got 1 x 5; .* is 4"),
        ({"train_examples": 44}, "expected its 45 training sequences, got 44; give the same data"),
        ({"seed": 1}, r"expected its training data \(.* seed 0\), got other data \(.* seed 1\); give the same data"),
    ],
)
def test_what_cannot_go_on_exactly_is_told(tmp_path: Path, changed: dict[str, int], message: str) -> None:
    checkpoint = interrupted(tmp_path, make_mqar(tmp_path), 4, "training_step")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make_mqar(tmp_path, **changed), fresh(), checkpoint)
    data = make_mqar(tmp_path, **changed)
    pl.Trainer(logger=False, accelerator="cpu").validate(fresh(), data, ckpt_path=checkpoint, weights_only=True)
    data.trainer = None
    assert len(data.train_dataloader()) == data.counts[0] // data.batch_size


def test_other_text_is_no_way_on_within_an_epoch(tmp_path: Path) -> None:
    checkpoint = interrupted(tmp_path, make_text(tmp_path), 4, "training_step")
    other = make_text(tmp_path)
    file = tmp_path / "a.txt"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"expected its training data \(bytes-.*-8\), got other data \(bytes-"):
        fit(tmp_path, other, fresh(), checkpoint)
    end = interrupted(tmp_path / "end", make_text(tmp_path), 10, "on_train_batch_end")
    file.write_bytes(file.read_bytes()[::-1])
    fit(tmp_path, make_text(tmp_path), fresh(), end)


def test_other_shards_are_no_way_on_within_an_epoch(tmp_path: Path) -> None:
    for name, letter in (("one", "1"), ("other", "2")):
        (tmp_path / f"{name}.txt").write_text(letter * 1000)
        prepare(str(tmp_path / f"{name}.txt"), tmp_path / name, processes=1)
    options = {"sequence_length": 8, "batch_size": BATCH, "val_fraction": 0.1}
    checkpoint = interrupted(tmp_path, PreparedDataModule(str(tmp_path / "one"), **options), 4, "training_step")
    with pytest.raises(ValueError, match="expected its training data"):
        fit(tmp_path, PreparedDataModule(str(tmp_path / "other"), **options), fresh(), checkpoint)


def test_processes_may_change_where_that_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If as many sequences make a step, and at an epoch's end."""
    model, _ = fit(tmp_path, make_mqar(tmp_path), fresh())
    checkpoint = interrupted(tmp_path, make_mqar(tmp_path), 4, "training_step")
    saved = torch.load(checkpoint, weights_only=True)
    saved["MQARDataModule"]["position"] |= {"processes": 2, "batch_size": 2}
    torch.save(saved, tmp_path / "two")
    assert fit(tmp_path, make_mqar(tmp_path), fresh(), tmp_path / "two")[0].seen == model.seen[4:]
    saved["MQARDataModule"]["position"]["batch_size"] = 4
    torch.save(saved, tmp_path / "other")
    with pytest.raises(ValueError, match="2 processes x batch_size 4, got 1 x 4"):
        fit(tmp_path, make_mqar(tmp_path), fresh(), tmp_path / "other")

    end = interrupted(tmp_path / "end", make_mqar(tmp_path), 10, "on_train_batch_end")
    data = make_mqar(tmp_path, batch_size=9)  # 5 batches
    fit(tmp_path, data, fresh(), end, max_steps=13)
    assert data._position() == (1, 2)
    assert data.state_dict()["position"]["batches_trained"] == 13


def test_checkpoints_without_a_position_go_on_by_the_count(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, make_mqar(tmp_path), fresh())
    checkpoint = interrupted(tmp_path, make_mqar(tmp_path), 13, "training_step")
    saved = torch.load(checkpoint, weights_only=True)
    del saved["MQARDataModule"]
    torch.save(saved, tmp_path / "old")
    assert fit(tmp_path, make_mqar(tmp_path), fresh(), tmp_path / "old")[0].seen == model.seen[13:]


def test_the_seed_decides_and_the_checkpoint_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = fit(tmp_path, make_mqar(tmp_path), fresh())
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    model, _ = fit(tmp_path, make_mqar(tmp_path), fresh())
    assert model.seen != plain.seen
    checkpoint = interrupted(tmp_path, make_mqar(tmp_path), 4, "training_step")
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert fit(tmp_path, make_mqar(tmp_path), fresh(), checkpoint)[0].seen == model.seen[4:]


def test_a_fit_of_its_own_starts_anew(tmp_path: Path) -> None:
    data = make_mqar(tmp_path)
    first, trainer = fit(tmp_path, data, fresh())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    pl.Trainer(logger=False, accelerator="cpu").validate(fresh(), data, ckpt_path=tmp_path / "some.ckpt")
    assert fit(tmp_path, data, fresh())[0].seen == first.seen


class CountingModel(SmallModel):
    """`SmallModel` in float64, which also counts what validation has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.sequences, self.labels = SumMetric(), SumMetric()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labeled = batch["labels"] != IGNORE_INDEX
        self.sequences.update(labeled.any(1).sum())
        self.labels.update(batch["labels"][labeled].sum())
        self.log_dict({"val/sequences": self.sequences, "val/labels": self.labels})


@pytest.mark.parametrize("make", [make_text, make_mixture])
def test_two_processes_train_and_validate_as_one(make: Callable[..., SequenceDataModule], tmp_path: Path) -> None:
    """On the same sequences in every step, and on each once; one process goes on from what two have done."""

    def counting() -> CountingModel:
        torch.manual_seed(0)
        return CountingModel()

    validate = {"val_check_interval": 3}
    one, trainer = fit(tmp_path, make(tmp_path, batch_size=6), counting(), max_steps=9, **validate)
    assert trainer.callback_metrics["val/sequences"] % 2 == 1
    data = make(tmp_path, batch_size=3)
    saving = ModelCheckpoint(tmp_path / "two", filename="end", every_n_train_steps=6)
    two, both = fit(
        tmp_path, data, counting(), strategy="ddp_spawn", devices=2, max_steps=6, callbacks=saving, **validate
    )
    assert both.callback_metrics == trainer.callback_metrics
    position = torch.load(tmp_path / "two/end.ckpt", weights_only=True)[type(data).__name__]["position"]
    assert (position["epoch"], position["batches"], position["processes"]) == (0, 6, 2)
    rest, _ = fit(
        tmp_path, make(tmp_path, batch_size=6), counting(), tmp_path / "two/end.ckpt", max_steps=9, **validate
    )
    assert [seen for seen, _ in rest.seen] == [seen for seen, _ in one.seen[6:]]
    assert torch.allclose(rest.embedding.weight, one.embedding.weight, rtol=0, atol=1e-10)
    assert not torch.equal(two.embedding.weight, rest.embedding.weight)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_the_batches_of_one(ranks: int) -> None:
    for epoch in (0, 7):
        one = TrainSampler(100, 12, seed=3)
        parts = [TrainSampler(100, 12 // ranks, ranks, rank, seed=3) for rank in range(ranks)]
        for sampler in (one, *parts):
            sampler.set_epoch(epoch)
            assert len(sampler) == len(list(sampler))
        whole = np.array(list(one)).reshape(8, 12)
        shared = np.concatenate([np.array(list(part)).reshape(8, -1) for part in parts], axis=1)
        assert np.array_equal(whole, shared)
        assert len(np.unique(whole)) == 96
    assert not np.array_equal(whole, np.array(list(TrainSampler(100, 12, seed=3))).reshape(8, 12))


@pytest.mark.parametrize(("count", "ranks"), [(7, 1), (7, 2), (7, 3), (6, 3), (1, 4)])
def test_processes_evaluate_every_sequence_once(count: int, ranks: int) -> None:
    """What fills up has no labels, so that no metric counts it."""
    items = [{"input_ids": torch.tensor([i]), "labels": torch.tensor([i])} for i in range(count)]
    dataset = PaddedDataset(items, IGNORE_INDEX)
    read = [[dataset[i]["labels"].item() for i in EvalSampler(count, ranks, rank)] for rank in range(ranks)]
    assert len({len(part) for part in read}) == 1
    assert sorted(x for part in read for x in part if x != IGNORE_INDEX) == list(range(count))
    assert all(item["labels"].item() == i for i, item in enumerate(items))


def test_too_little_data_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"at least batch_size \* processes = 64 sequences, got 45; lower data.batch_size"
    ):
        fit(tmp_path, make_mqar(tmp_path, batch_size=64), fresh())
