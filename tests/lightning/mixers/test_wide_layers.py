"""Layers that keep a different number of keys: against brute force, in caches, in a run, and with wrong options."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import CHECKPOINTS, make
from torch import Tensor

from dma_kernels import KeepRule, reference_attention, reference_mask
from dma_lightning import LanguageModel
from dma_lightning.config import ModelConfig
from dma_lightning.huggingface.config import doge_config
from dma_lightning.mixers import DynamicMaskAttention
from dma_lightning.mixers.base import merge_heads
from dma_lightning.model import DogeForCausalLM

SMALL = ModelConfig(
    vocab_size=32, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
    intermediate_size=24, attention="dma", keep_window_size=3, keep_last=2, sinks=1, wide_layers=(1,),
    wide_keep_window_size=9, backend="torch",
)  # fmt: skip
RULES = [KeepRule(3, 2, 1), KeepRule(9, 2, 1), KeepRule(3, 2, 1)]


def model_of(config: ModelConfig) -> DogeForCausalLM:
    """A model in float64 whose selection differs from a window."""
    torch.manual_seed(0)
    model = DogeForCausalLM(config).double().eval()
    for mixer in model.mixers:
        torch.nn.init.normal_(mixer.A)
        torch.nn.init.normal_(mixer.dt_proj.weight)
    return model


def by_definition(mixer: DynamicMaskAttention, x: Tensor, rule: KeepRule) -> Tensor:
    """The mixer's output, computed with a dense mask for a rule."""
    q, k, v = mixer.queries_keys_values(x, None)
    keys = mixer._ranked(x, v, None)
    dense = reference_mask(
        keys.rank, keep_window_size=rule.window, keep_last=rule.last, sinks=rule.sinks, documents=None, padding=None
    )
    return mixer.o_proj(merge_heads(reference_attention(q, k, v, keys.key_bias, dense)))


@pytest.mark.parametrize("drift", [{}, {"drift": "gate", "score_form": "linear", "content": "input"}])
def test_outputs_and_gradients_are_those_of_each_layers_own_rule(drift: dict[str, str]) -> None:
    model = model_of(replace(SMALL, **drift))
    assert [mixer.keep for mixer in model.mixers] == [mixer.own_keep for mixer in model.mixers] == RULES
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    for mixer, rule in zip(model.mixers, RULES, strict=True):
        results = []
        for output in (mixer(x), by_definition(mixer, x, rule)):
            gradients = torch.autograd.grad(output.pow(2).sum(), list(mixer.parameters()), allow_unused=True)
            results.append([output, *(g for g in gradients if g is not None)])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 30, 2]])
def test_caches_keep_what_their_layers_keep(chunks: list[int]) -> None:
    model, tokens = model_of(SMALL), torch.randint(32, (2, 40))
    caches = model.new_cache(2)
    logits = torch.cat([model(part, cache=caches) for part in tokens.split(chunks, 1)], 1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-9, atol=1e-9)
    assert [cache.keep for cache in caches] == RULES


@pytest.mark.parametrize(("window", "wide", "warns"), [(3, 64, False), (64, 3, False), (64, 64, True)])
def test_a_run_warns_if_no_layer_drops_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, wide: int, warns: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"keep_window_size={window}", "num_hidden_layers=2", "wide_layers=[0]", f"wide_keep_window_size={wide}"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make(tmp_path, "--trainer.max_steps=1", *(f"--model.{flag}" for flag in flags))
    assert any("no key is ever dropped" in str(x.message) for x in told) is warns


def test_a_run_and_its_checkpoint_keep_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["attention=dma", "num_hidden_layers=2", "wide_layers=[1]", "wide_keep_window_size=12"]
    make(tmp_path, *(f"--model.{flag}" for flag in flags))
    loaded = LanguageModel.load_from_checkpoint(Path(CHECKPOINTS, "last.ckpt"), map_location="cpu")
    assert [mixer.keep.window for mixer in loaded.model.mixers] == [8, 12]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wide_layers": (3,)}, r"wide_layers: expected numbers from 0 to 2, of the model's 3 layers, got \[3\]"),
        ({"wide_layers": (-1,)}, r"wide_layers: expected numbers of layers, counted from 0, .* got \[-1\]"),
        ({"wide_layers": ()}, r"wide_layers: expected numbers of layers, .* with wide_keep_window_size 9, got \[\]"),
        ({"wide_keep_window_size": 0}, "wide_keep_window_size: expected at least 1, got 0"),
    ],
)
def test_wrong_layers_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DogeForCausalLM(replace(SMALL, **changed))


def test_doge_knows_no_wide_layers() -> None:
    with pytest.raises(ValueError, match=r"got wide_layers \(.*\) \(Doge: \(\)\); it would compute"):
        doge_config(replace(SMALL, keep_last=0, sinks=0))
