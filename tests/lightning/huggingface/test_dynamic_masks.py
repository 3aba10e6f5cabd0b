"""Models of Transformers with dynamic masks: computing, training, generating, and saving."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dma_kernels import reference_attention, reference_mask
from dma_lightning.transformers import DynamicMasksCache, add_dynamic_masks, load_with_dynamic_masks
from dma_lightning.transformers.attention import dynamic_mask_attention

PAGE = Path(__file__).parents[3] / "docs/transformers.md"
SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    "initializer_range": 0.2, "attn_implementation": "eager",
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7, "use_sliding_window": True}
GEMMA = {"attn_logit_softcapping": None, "query_pre_attn_scalar": 50, "sliding_window": 7}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, **GEMMA)),  # another scale, and a sliding layer
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def batch(length: int = 40) -> tuple[Tensor, Tensor]:
    """Tokens `[2, N]` and an attention mask, the second row padded on the left."""
    tokens, mask = torch.randint(1, 61, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, :13] = 0
    return tokens, mask


def masked_model(family: str = "qwen3", **sizes: Any) -> PreTrainedModel:
    """A model with dynamic masks whose ranks differ."""
    model = FAMILIES[family]().eval()
    add_dynamic_masks(model, **{"keep_window_size": 9} | sizes)
    spread(model)
    return model


def spread(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if "dynamic_mask" in name:
            torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_wide_window_is_the_model_itself(family: str) -> None:
    model, (tokens, mask) = FAMILIES[family]().eval(), batch()
    expected = model(tokens, attention_mask=mask).logits
    add_dynamic_masks(model, keep_window_size=40)
    logits = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_new_mask_is_a_sliding_window() -> None:
    model, (tokens, _) = FAMILIES["qwen3"]().eval(), batch()
    windows = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "use_sliding_window": True}
    sliding = Qwen3ForCausalLM(Qwen3Config(**GROUPED, **windows)).eval()
    sliding.load_state_dict(model.state_dict())
    add_dynamic_masks(model, keep_window_size=9)
    torch.testing.assert_close(model(tokens).logits, sliding(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["padding", "documents"])
@pytest.mark.parametrize("sizes", [{}, {"keep_last": 3, "sinks": 2, "score_form": "linear"}], ids=str)
@torch.no_grad()
def test_layers_compute_the_definition(kind: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, mask = batch()
    documents = torch.tensor([[0] * 25 + [1] * 15, [0] * 5 + [1] * 35])
    positions = torch.stack([torch.cat([torch.arange(n) for n in x]) for x in ((25, 15), (5, 35))])
    inputs = {"attention_mask": mask} if kind == "padding" else {"position_ids": positions, "use_cache": False}
    packing = {"padding": mask == 0} if kind == "padding" else {"documents": documents}
    largest = []

    def compared(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        ranks, key_bias = module.dynamic_mask(v)
        lasting = {name: x for name, x in sizes.items() if name != "score_form"}
        dense = reference_mask(ranks, 9, **packing, **lasting)
        out, weights = dynamic_mask_attention(module, q, k, v, *args, **options)
        expected = reference_attention(q, k, v, key_bias, dense).transpose(1, 2)
        largest.append((out - expected).abs().max())
        assert dense.sum() < 0.9 * dense.shape[1] * 2 * 40 * 41 / 2  # something is left out
        return out, weights

    model = masked_model(**sizes)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "dma", compared)
    model(tokens, **inputs)
    assert len(largest) == 2
    assert max(largest) < 1e-5


@torch.no_grad()
def test_documents_do_not_see_each_other() -> None:
    model, (tokens, _) = masked_model(sinks=1), batch()
    positions = torch.cat([torch.arange(25), torch.arange(15)]).expand(2, -1)
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    parts = [model(x, use_cache=False).logits for x in tokens.split([25, 15], dim=1)]
    torch.testing.assert_close(logits, torch.cat(parts, dim=1), rtol=0, atol=1e-5)


def gradients(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # older versions know no other
def test_gradients_reach_all_and_checkpointing_keeps_them() -> None:
    model, (tokens, _) = masked_model().train(), batch()
    expected = gradients(model, tokens)
    assert sum("dynamic_mask" in name and bool(x.abs().max() > 1e-6) for name, x in expected.items()) == 4
    model.gradient_checkpointing_enable()
    for name, x in gradients(model, tokens).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_autocast_computes_in_its_dtype() -> None:
    model, (tokens, _) = masked_model().train(), batch()
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
        cache = DynamicMasksCache(model)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    assert cache.layers[0].slots.state.key.dtype == torch.bfloat16


@torch.no_grad()
def recomputed(model: PreTrainedModel, tokens: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy text with a full forward pass for each token, and the logits `[count, B, V]` of all tokens."""
    chosen_by = []
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        chosen_by.append(logits)
    return tokens, torch.stack(chosen_by)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_the_full_forward(family: str) -> None:
    model, (tokens, mask) = masked_model(family, sinks=1), batch()
    expected, logits = recomputed(model, tokens, mask, 20)
    cache = DynamicMasksCache(model)
    told = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    told |= {"output_logits": True, "return_dict_in_generate": True}
    for options in ({"past_key_values": cache}, {"past_key_values": cache, "prefill_chunk_size": 11}, {}):
        made = model.generate(tokens, **told, **options)
        assert torch.equal(made.sequences, expected), options
        torch.testing.assert_close(torch.stack(made.logits), logits, rtol=0, atol=2e-5)
        assert cache.get_seq_length() == (59 if options else 0)
        cache.reset()


def test_rows_and_guesses_of_the_cache() -> None:
    """Beam search reorders rows, and prompt lookup takes back what it has guessed wrong."""
    model, (tokens, mask) = masked_model(sinks=1), batch()
    cache = DynamicMasksCache(model)
    options = {"max_new_tokens": 20, "do_sample": False}
    beams = {"attention_mask": mask, "num_beams": 3} | options
    assert torch.equal(model.generate(tokens, past_key_values=cache, **beams), model.generate(tokens, **beams))
    one, cache = tokens[:1].repeat(1, 2), DynamicMasksCache(model)
    guessed = model.generate(one, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(guessed, recomputed(model, one, torch.ones_like(one), 20)[0])


@torch.no_grad()
def test_wrong_guesses_are_taken_back() -> None:
    model, (tokens, _) = masked_model(sinks=1), batch()
    cache = DynamicMasksCache(model)
    model(tokens[:, :20], past_key_values=cache)
    cache.activate_past_recording()
    model(torch.cat([tokens[:, 20:23], tokens[:, :4]], dim=1), past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 23
    logits = [model(x, past_key_values=cache).logits for x in tokens[:, 23:].split(10, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens).logits[:, 23:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expected -7 to 0, since 7 tokens were read"):
        cache.crop(-9)


@pytest.mark.parametrize("family", ["gemma2", "gpt-neox"])
@torch.no_grad()
def test_a_saved_model_is_the_same(family: str, tmp_path: Path) -> None:
    model, (tokens, _) = masked_model(family, sinks=1, keep_last=2), batch()
    model.save_pretrained(tmp_path / "model")
    again = load_with_dynamic_masks(tmp_path / "model", dtype=torch.float32).eval()
    assert type(again) is type(model)
    assert model.state_dict().keys() == again.state_dict().keys()
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    again.save_pretrained(tmp_path / "again")
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "model" / x).read_bytes() == (tmp_path / "again" / x).read_bytes() for x in names)
    FAMILIES[family]().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"expected dynamic_masks in config\.json"):
        load_with_dynamic_masks(tmp_path / "plain")
    (tmp_path / "plain/config.json").write_bytes((tmp_path / "model/config.json").read_bytes())
    with pytest.raises(ValueError, match="expected weights of dynamic masks"):
        load_with_dynamic_masks(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changed", "sizes", "message"),
    [
        ({}, {"keep_window_size": 0}, "keep_window_size: expected at least 1, got 0"),
        ({}, {"score_form": "log"}, "score_form: expected one of"),
        ({}, {"backend": "best"}, "backend: expected one of"),
        (SLIDING | {"layer_types": ["sliding_attention"] * 2}, {}, "got sliding_window 7 in all"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, {}, "got 'chunked_attention' in layer 1"),
    ],
)
def test_conversion_says_what_is_wrong(changed: dict, sizes: dict, message: str) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**GROUPED))
    model.config.update(changed)
    with pytest.raises(ValueError, match=message):
        add_dynamic_masks(model, **{"keep_window_size": 9} | sizes)
    assert model.config._attn_implementation == "eager"


def test_calls_say_what_is_wrong() -> None:
    model, (tokens, mask) = masked_model(), batch()
    with pytest.raises(ValueError, match="expected a model without dynamic masks"):
        add_dynamic_masks(model, keep_window_size=9)
    with pytest.raises(ValueError, match="expected inference"):
        model(tokens, past_key_values=DynamicMasksCache(model))
    with pytest.raises(ValueError, match=r"attention_mask: expected None or 0/1 \[B, N\]"):
        model(tokens, attention_mask=mask[:, None, None])
    with pytest.raises(ValueError, match=r"attention_mask: expected \[2, 40\]"), torch.no_grad():
        model(tokens, attention_mask=mask[:, :9], past_key_values=DynamicMasksCache(model))
    with pytest.raises(ValueError, match="use DynamicMasksCache or DynamicCache"), torch.no_grad():
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    model.set_attn_implementation("sdpa")
    cache = DynamicMasksCache(model)
    model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="attention of the last call to have read its keys"):
        model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="expected a model with dynamic masks"):
        DynamicMasksCache(FAMILIES["llama"]())
    plain = FAMILIES["llama"]()
    plain.set_attn_implementation("dma")
    with pytest.raises(ValueError, match="expected a layer of a model with dynamic masks"):
        plain(tokens)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, attention_dropout=0.1)), "expected no dropout"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, attention_dropout=0.0)), "expected no softcap"),
    ],
)
def test_attentions_of_another_kind_are_refused(made: Callable[[], PreTrainedModel], message: str) -> None:
    model = made().train()
    add_dynamic_masks(model, keep_window_size=9)
    with pytest.raises(ValueError, match=message):
        model(batch()[0])


def test_without_transformers_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [x for x in sys.modules if re.match(r"(dma_lightning\.)?transformers\b", x)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"install dma-lightning\[transformers\]"):
        import dma_lightning.transformers  # noqa: F401


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(example, names)
    assert names["text"].shape == (2, 48)
    assert torch.equal(names["again"].lm_head.weight, names["model"].lm_head.weight)
    assert any(x.abs().max() > 0 for name, x in names["again"].named_parameters() if name.endswith(".A"))
