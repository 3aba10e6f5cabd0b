"""The decoder equals Hugging Face's Doge, and has the published sizes."""

import dataclasses

import pytest
import torch
from transformers import DogeConfig
from transformers import DogeForCausalLM as HFDogeForCausalLM

from dma_lightning import DogeForCausalLM, ModelConfig


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_hugging_face_doge(kv_heads: int, tied: bool) -> None:
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 111,
        "keep_window_size": 13,
        "tie_word_embeddings": tied,
    }
    theirs = HFDogeForCausalLM(DogeConfig(**shape, attn_implementation="eager")).eval()
    for name, parameter in theirs.named_parameters():
        # Away from the initial values: spread ranks without ties, norms and residual weights that matter.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.3 if name.endswith(".A") else 1.0, std=0.2)
        elif "dt_proj" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    ours = DogeForCausalLM(ModelConfig(**shape, backend="torch"))
    state = {name.removeprefix("model."): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state | {"lm_head.weight": theirs.lm_head.weight})
    input_ids = torch.randperm(97)[None].repeat(2, 1)  # no token twice: tie-free scores
    with torch.no_grad():
        expected, logits = theirs(input_ids).logits, ours(input_ids)
        unmasked = DogeForCausalLM(dataclasses.replace(ours.config, keep_window_size=111))
        unmasked.load_state_dict(ours.state_dict())
        assert (unmasked(input_ids) - expected).abs().max() > 1e-3  # the selection matters here
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_parameter_counts() -> None:
    config = ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    tied = DogeForCausalLM(config)
    untied = DogeForCausalLM(dataclasses.replace(config, tie_word_embeddings=False))
    # q, o: 16 * 16; k, v: 16 * 8; A: 2; dt: 8 * 2; q and k norms: 4; mlp: 3 * 16 * 24; norms, residuals: 16 each
    layer = 2 * 256 + 2 * 128 + 2 + 16 + 2 * 4 + 3 * 384 + 4 * 16
    assert tied.num_non_embedding_parameters == untied.num_non_embedding_parameters == 2 * layer + 16
    assert tied.num_parameters == 2 * layer + 16 + 800
    assert untied.num_parameters == 2 * layer + 16 + 1600


@pytest.mark.parametrize("window", [1, 7, 100, 200])
def test_flops_per_token_count_visible_keys(window: int) -> None:
    config = ModelConfig(max_position_embeddings=100, keep_window_size=window)
    model = DogeForCausalLM(config)
    keys = sum(min(window, t + 1) for t in range(100)) / 100
    weights = model.num_non_embedding_parameters + 256 * 128
    assert model.flops_per_token == pytest.approx(6 * weights + 12 * 4 * 128 * keys)


def test_models_start_alike_whatever_their_mixer() -> None:
    def start(**options: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return DogeForCausalLM(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, **options)).state_dict()

    mha, dma = start(attention="mha"), start(attention="dma")
    drifting = start(attention="dma", drift="gate", score_form="linear", content="input")
    for name, weight in mha.items():
        assert weight.equal(dma[name])
        assert weight.equal(drifting[name])
    own = [dma[f"layers.{layer}.self_attn.dt_proj.weight"] for layer in range(2)]
    assert not own[0].equal(own[1])
    assert torch.stack(own).std().item() == pytest.approx(0.02, rel=0.3)


def test_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = DogeForCausalLM(ModelConfig(num_hidden_layers=1))
        assert model(torch.zeros(2, 20, dtype=torch.long)).shape == (2, 20, 256)


def test_dropout_only_in_training() -> None:
    model = DogeForCausalLM(ModelConfig(num_hidden_layers=1, hidden_dropout=0.5))
    tokens = torch.randint(0, 256, (1, 20))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 257, dtype=torch.long), "at most max_position_embeddings = 256 tokens, got 257; shorten"),
        (torch.zeros(2, 5), r"input_ids: expected integers \[B, N\], got torch.float32"),
        (torch.zeros(5, dtype=torch.long), r"input_ids: expected integers \[B, N\]"),
        (torch.zeros(2, 5, dtype=torch.long, device="meta"), "input_ids: expected on cpu as the model, got meta"),
    ],
)
def test_bad_inputs(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DogeForCausalLM(ModelConfig(num_hidden_layers=1))(tokens)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1"),
        ({"rope_theta": 0.0}, "rope_theta: expected more than 0, got 0.0"),
        ({"hidden_dropout": 1.0}, "hidden_dropout: expected 0 <= p < 1, got 1.0"),
    ],
)
def test_bad_config(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changed)
