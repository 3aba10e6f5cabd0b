"""The memory of a step: a close lower bound, and a warning before memory runs out."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from small_run import SIZES
from torch import Tensor

from dma_lightning import LanguageModel, MQARDataModule, step_memory
from dma_lightning.step_memory import available_bytes, least_step_bytes

CPU = torch.device("cpu")


def kept_bytes(module: LanguageModel, batch: int, length: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, without weights. Each storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.randint(module.model.config.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = module.training_step({"input_ids": ids, "labels": ids}, 0)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["dma", "mha", "swa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bound_is_below_what_a_step_keeps(attention: str, checkpointing: bool) -> None:
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "attention": attention}
    module = LanguageModel(
        vocab_size=256,
        max_position_embeddings=512,
        activation_checkpointing=checkpointing,
        **sizes,
    )
    weights = 12 * module.model.num_parameters
    bound = least_step_bytes(module.model, 2, 512, 4) - weights
    logits = 2 * 512 * 256 * 4  # their gradient comes in the backward pass
    kept = kept_bytes(module, 2, 512) + logits
    assert 0.2 * kept < bound < kept


@pytest.mark.parametrize("options", [{"train_only": "selection"}, {"lora": {"rank": 2, "targets": ["q_proj"]}}])
def test_frozen_weights_take_nothing(options: dict[str, object]) -> None:
    module = LanguageModel(vocab_size=256, max_position_embeddings=512, **SIZES, **options)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained < module.model.num_parameters / 2
    bound = least_step_bytes(module.model, 2, 512, 4) - 12 * trained
    assert 0 < bound < kept_bytes(module, 2, 512) + 2 * 512 * 256 * 4


def test_weights_count_by_their_share() -> None:
    model = LanguageModel(vocab_size=16, max_position_embeddings=16, **SIZES).model
    one, four = (least_step_bytes(model, 1, 16, 4, shards) for shards in (1, 4))
    assert one - four == 12 * model.num_parameters - 12 * model.num_parameters // 4
    assert least_step_bytes(model, 1, 16, 4, spared=100) == one - 400


def test_the_least_of_all_limits_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, limit, none = (tmp_path / name for name in ("meminfo", "max", "none"))
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(step_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(step_memory, "_CGROUP_LIMITS", (limit, none))
    for text, found in (("max\n", 5_120_000), ("4096\n", 4096), ("9223372036854771712\n", 5_120_000)):
        limit.write_text(text)
        assert available_bytes(CPU) == found
    monkeypatch.setattr(step_memory, "_MEMINFO", none)  # another system
    assert available_bytes(CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_it_has() -> None:
    free = available_bytes(torch.device("cuda", 0))
    assert free is not None
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("available", [10**6, 10**12])
def test_a_step_that_cannot_fit_is_told_before_it_begins(available: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "available_bytes", lambda device: available)
    model = LanguageModel(vocab_size=64, max_position_embeddings=16, schedule="constant", **SIZES)
    data = MQARDataModule(
        vocab_size=64, sequence_length=16, num_pairs=2, train_examples=128, val_examples=64, batch_size=64
    )
    told: list[str] = []
    monkeypatch.setattr("dma_lightning.language_model.rank_zero_warn", told.append)
    warned_before = []
    begin = LanguageModel.training_step

    def step(*args: object) -> Tensor:
        warned_before.extend(text for text in told if "a step takes at least" in text)
        return begin(*args)

    monkeypatch.setattr(LanguageModel, "training_step", step)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_model_summary=False, **quiet)
    trainer.fit(model, data)
    assert bool(warned_before) == (available < 10**9)
    assert not warned_before or "(batch_size 64 x sequence_length 16), and cpu has 0.0 GB left" in warned_before[0]
