"""Our models that are not Doge models, as loaded by `AutoModelForCausalLM` of Transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chosen_form import CHOSEN
from test_huggingface import SHAPE, command, spread, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dma_lightning import DogeForCausalLM, LanguageModel, ModelConfig, save_for_transformers
from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.huggingface.config import beyond_doge
from dma_lightning.transformers import DmaLightningConfig, DmaLightningForCausalLM

KINDS: list[dict[str, Any]] = [
    {"keep_last": 3, "sinks": 1, "tie_word_embeddings": True},
    {"score_form": "linear", "drift": "gate", "memory_heads": 1, "memory_stripes": 2},
    CHOSEN | {"wide_layers": (1,), "wide_keep_window_size": 20},
    {"attention": "mla", "attention_bias": True},
    {"attention": "nsa"},
]


def make(**changed: Any) -> DogeForCausalLM:
    torch.manual_seed(0)
    model = DogeForCausalLM(ModelConfig(**SHAPE | {"initializer_range": 0.2} | changed)).eval()
    spread(model)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens `[2, 40]` and an attention mask, the second row padded on the left."""
    tokens, mask = torch.randint(97, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    return tokens, mask


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_logits_and_text_are_ours(kind: dict[str, Any], tmp_path: Path) -> None:
    ours, (tokens, mask) = make(**kind), batch()
    assert save_for_transformers(ours, tmp_path / "model") == "dma_lightning"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits = theirs(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits, ours(tokens, padding=mask == 0), rtol=0, atol=1e-6)
    text = theirs.generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(text[:, 40:], ours.generate(tokens, 20, padding=mask == 0))
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    assert again.decoder.config == dataclasses.replace(ours.config, backend="auto")
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in again.decoder.float().state_dict().items())


def test_training_beams_and_documents() -> None:
    model = DmaLightningForCausalLM(DmaLightningConfig(shape=dataclasses.asdict(make(keep_last=3).config)))
    tokens, mask = batch()
    found = []
    for checkpoints in (False, True):
        model.gradient_checkpointing = checkpoints
        model.train().zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append(model.decoder.layers[0].self_attn.A.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])
    model.eval()
    parts = [model(x).logits for x in tokens.split([25, 15], dim=1)]
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    torch.testing.assert_close(model(tokens, position_ids=positions).logits, torch.cat(parts, dim=1))
    told = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    recomputed = model.generate(tokens, use_cache=False, **told)
    assert torch.equal(model.generate(tokens, **told), recomputed)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(tokens[:1], prompt_lookup_num_tokens=3, max_new_tokens=3)


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    save_for_transformers(make(keep_last=3), tmp_path / "model")
    path = tmp_path / "model/config.json"
    written = json.loads(path.read_text())
    for changed, message in (
        ({"keep_best": 3}, r"shape: expected fields that this version knows, got \['keep_best'\]"),
        ({"keep_last": "3"}, r"shape\.keep_last: Expected `int`, got `str`"),
        ({"num_hidden_layers": 3}, "expected all weights of the model"),
    ):
        path.write_text(json.dumps(written | {"shape": written["shape"] | changed}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")


NEW = ("drift", "drift_range", "content", "content_in_bias", "memory_heads", "wide_layers", "retention_weight")


@torch.no_grad()
def test_a_file_without_the_new_fields_has_the_published_form(tmp_path: Path) -> None:
    ours, (tokens, _) = make(sinks=1), batch()
    save_for_transformers(ours, tmp_path / "model")
    path = tmp_path / "model/config.json"
    written = json.loads(path.read_text())
    for name in (*NEW, "score_form", "keep_last"):
        del written["shape"][name]
    path.write_text(json.dumps(written))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert beyond_doge(theirs.decoder.config) == {"sinks": 1}
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [{}, {"keep_last": 3}], ids=["doge", "own"])
def test_an_export_has_its_tokenizer(
    kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for vocabulary, bytes_per_token in ((97, None), (256, 1.0)):
        model = make(vocab_size=vocabulary, eos_token_id=[7, 9], bos_token_id=1, **kind)
        module = LanguageModel(bytes_per_token=bytes_per_token, **dataclasses.asdict(model.config))
        module.model.load_state_dict(model.state_dict())
        folder = tmp_path / str(vocabulary)
        folder.mkdir()
        saved = {"state_dict": module.state_dict(), module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams)}
        AtomicCheckpointIO().save_checkpoint(saved, folder / "model.ckpt")
        if vocabulary == 97:
            write_tokenizer(folder / "tokenizer.json")
        command(monkeypatch, "export-hf", folder / "model.ckpt", folder / "out")
        printed = capsys.readouterr().out
        for said in ("first import dma_lightning.transformers", "Doge cannot express keep_last 3; only models"):
            assert (said in printed) == bool(kind)
        theirs, tokenizer = (x.from_pretrained(folder / "out") for x in (AutoModelForCausalLM, AutoTokenizer))
        assert theirs.generation_config.eos_token_id == [7, 9]
        assert theirs.generation_config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 7
        text = "w3 w5 w8" if vocabulary == 97 else "\tnaïve\x00 日本 \n"
        expected = [3, 5, 8] if vocabulary == 97 else list(text.encode())
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode(expected) == text
    if not kind:
        command(monkeypatch, "import-hf", folder / "out", tmp_path / "ours")
        assert LanguageModel.load_from_checkpoint(tmp_path / "ours/model.ckpt").hparams["bytes_per_token"] == 1.0
