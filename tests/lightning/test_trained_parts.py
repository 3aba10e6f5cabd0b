"""Training part of a model leaves the rest unchanged."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch import Tensor

from dma_lightning import LanguageModel, MQARDataModule
from dma_lightning.checkpoints import ResumableCheckpoint

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "keep_window_size": 4,
}  # fmt: skip
DRIFT = {"drift": "gate", "score_form": "linear", "content": "input", "retention_weight": 0.1}


def trained(folder: Path, steps: int, **model: object) -> dict[str, Tensor]:
    """Train some steps, from the last checkpoint in the folder if there is one; the weights."""
    pl.seed_everything(0)
    module = LanguageModel(**SIZES | model, schedule="constant", lr=0.01)
    checkpoint = ResumableCheckpoint(dirpath=folder, every_n_train_steps=2)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[checkpoint], logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, gradient_clip_val=1.0, accumulate_grad_batches=2,
    )  # fmt: skip
    last = folder / "last.ckpt"
    data = MQARDataModule(32, 16, 2, train_examples=64, batch_size=4)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    return {name: x.detach().clone() for name, x in module.model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, DRIFT], ids=["published", "drift"])
@pytest.mark.parametrize("part", ["selection", "attention"])
def test_other_weights_stay(part: str, options: dict[str, object], tmp_path: Path) -> None:
    pl.seed_everything(0)
    before = LanguageModel(**SIZES | options).model.state_dict()
    after = trained(tmp_path, 4, train_only=part, **options)
    changed = {name for name in before if not before[name].equal(after[name])}
    selecting = {name for name in before if ".A" in name or "dt_proj" in name or "drifting" in name}
    attention = {name for name in before if "self_attn" in name}
    assert changed <= (selecting if part == "selection" else attention)
    assert {name for name in changed if ".A" in name or "drifting.drift.rate" in name}
    assert part == "selection" or any("q_proj" in name for name in changed)


def test_a_run_goes_on_with_another_part(tmp_path: Path) -> None:
    pl.seed_everything(0)
    start = LanguageModel(**SIZES).model.state_dict()
    first = trained(tmp_path, 2, train_only="selection")
    assert first["layers.0.mlp.up_proj.weight"].equal(start["layers.0.mlp.up_proj.weight"])
    again = trained(tmp_path, 4, train_only="all")
    assert not first["layers.0.mlp.up_proj.weight"].equal(again["layers.0.mlp.up_proj.weight"])


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match=r"train_only: expected one of .*, got 'heads'"):
        LanguageModel(**SIZES, train_only="heads")
    with pytest.raises(ValueError, match="train_only: expected all or attention with attention 'mha'"):
        LanguageModel(**SIZES, attention="mha", train_only="selection")
    assert all(p.requires_grad for p in LanguageModel(**SIZES).parameters())
