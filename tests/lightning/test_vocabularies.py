"""Tokens outside a model's vocabulary are reported with both sizes, before they are looked up."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from small_run import SIZES
from small_texts import make_data, write_tokenizer
from torch.utils.data import DataLoader, Dataset

from dma_lightning import (
    ByteTokenizer,
    DogeForCausalLM,
    LanguageModel,
    ModelConfig,
    PreparedDataModule,
    stream_text,
    stream_tokens,
)
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import IGNORE_INDEX

STAGES = ["fit", "validate", "test", "predict"]


def small_model(vocab_size: int) -> LanguageModel:
    return LanguageModel(**SIZES, vocab_size=vocab_size, max_position_embeddings=10, schedule="constant")


def run(stage: str, model: LanguageModel, data: pl.LightningDataModule | DataLoader) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=2,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1, limit_test_batches=1,
        limit_predict_batches=1,
    )  # fmt: skip
    getattr(trainer, stage)(model, data)


class Rows(Dataset):
    """Identical sequences."""

    def __init__(self, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        self.item = {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item


@pytest.mark.parametrize("stage", STAGES)
def test_data_that_has_more_tokens_than_the_model(stage: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\x01\x02\x03" * 99)  # which the model knows, but of the data it does not know all
    with pytest.raises(ValueError, match=r"expected at most the 64 tokens of the model \(vocab_size\), got 256; give"):
        run(stage, small_model(64), make_data(tmp_path, tmp_path / "a.txt"))
    with warnings.catch_warnings(record=True) as told:
        run(stage, small_model(300), make_data(tmp_path, tmp_path / "a.txt"))
    assert not any("on_before_batch_transfer" in str(warning.message) for warning in told)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("input_ids", "labels", "message"),
    [
        ([1, 200, 3], [1, 2, 3], "input_ids: expected tokens below the model's vocab_size = 64, .* got 200; give"),
        ([1, IGNORE_INDEX, 3], [1, 2, 3], "input_ids: expected tokens below .* = 64, none of them negative, got -100"),
        ([1, 2, 3], [1, IGNORE_INDEX, 64], "labels: expected tokens below the model's vocab_size = 64, .* got 64"),
        ([1, 2, 3], [1, IGNORE_INDEX, -1], "labels: expected tokens below .* = 64, none of them negative, got -1"),
    ],
)
def test_batches_of_loaders_that_do_not_say_their_tokens(
    stage: str, input_ids: list[int], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(stage, small_model(64), DataLoader(Rows(input_ids, labels), batch_size=2))


def test_batches_with_labels_that_are_ignored_pass() -> None:
    run("validate", small_model(64), DataLoader(Rows([0, 63, 3], [IGNORE_INDEX, 63, 0]), batch_size=2))


def test_damaged_shards_that_nobody_has_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some words " * 99)
    write_tokenizer(tmp_path / "t.json")
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", str(tmp_path / "t.json"), processes=1)
    tokens = np.memmap(tmp_path / "out/shard-00000.tokens", np.uint16, "r+")
    tokens[-10:] = 9999
    tokens.flush()
    monkeypatch.setenv("DMA_VERIFY_FILES", "0")
    with pytest.raises(ValueError, match=r"(input_ids|labels): expected tokens below .* = 300, .* got 9999"):
        run("validate", small_model(300), PreparedDataModule(str(tmp_path / "out"), 10, val_fraction=0.05))


def test_a_model_that_is_called() -> None:
    model = DogeForCausalLM(ModelConfig(**SIZES, vocab_size=64))
    message = "input_ids: expected tokens below the model's vocab_size = 64, .* got 64; give the model"
    for ids in (torch.tensor([[1, 64, 2]]), torch.tensor([[1, 64, 2]], dtype=torch.int32)):
        for read_it in (model, lambda x: model.generate(x, 2), lambda x: model(x, cache=model.new_cache(1))):
            with pytest.raises(ValueError, match=message):
                read_it(ids)
    with pytest.raises(ValueError, match=r"vocab_size = 64, .* got 122"):
        next(stream_text(model, ByteTokenizer(), "z", 1))


@pytest.mark.parametrize("eos", [64, [2, 64], [9999, 2]])
def test_end_tokens_that_no_text_has(eos: int | list[int]) -> None:
    model = DogeForCausalLM(ModelConfig(**SIZES, vocab_size=64))
    with pytest.raises(ValueError, match=r"eos_token_id: expected tokens below .* = 64, got (64|9999); name"):
        model.generate(torch.tensor([[1]]), 2, eos_token_id=eos)


def test_negative_end_tokens_are_none() -> None:
    """Also as the first of several, with which rows that have ended would be filled up."""
    model = DogeForCausalLM(ModelConfig(**SIZES, vocab_size=64))
    ids = torch.tensor([[1], [2]])
    first = int(model.generate(ids[:1], 1)[0, 0])
    assert torch.equal(model.generate(ids, 4, eos_token_id=-1), model.generate(ids, 4))
    assert torch.equal(model.generate(ids, 4, eos_token_id=[-1, first]), model.generate(ids, 4, eos_token_id=first))


def test_prompts_are_looked_at_before_a_model_reads_them() -> None:
    """On a GPU, it would be too late then."""

    class Reads(DogeForCausalLM):
        def forward(self, *args: object, **options: object) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(ValueError, match=r"input_ids: expected tokens below the model's vocab_size = 64, .* got 64"):
        next(stream_tokens(Reads(ModelConfig(**SIZES, vocab_size=64)), torch.tensor([[64]]), 1))
