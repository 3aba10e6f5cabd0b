"""Every token mixer is causal, decodes exactly, and trains all of its parameters. Four have an oracle here."""

from collections.abc import Iterator
from dataclasses import replace

import masks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from dma_kernels import Packing
from dma_lightning import MIXERS, DogeForCausalLM, DynamicMaskAttention, ModelConfig, TokenMixer
from dma_lightning.mixers import SlidingWindowAttention
from dma_lightning.mixers.position_cache import PositionCache
from dma_lightning.rotary import apply_rope

LENGTH = 70
CONFIG = ModelConfig(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, keep_window_size=9, sliding_window=9,
    kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, backend="torch",
    nsa_compress_block=8, nsa_compress_stride=4, nsa_compress_hidden=16, nsa_select_block=8, nsa_select_count=4,
    nsa_window=5,
)  # fmt: skip
VARIANTS = {name: replace(CONFIG, attention=name) for name in MIXERS}
VARIANTS["nsa, shared"] = replace(CONFIG, attention="nsa", nsa_separate_kv=False)
APART = {"nsa_compress_stride": 8, "nsa_select_block": 16}
VARIANTS["nsa, apart, no QK-norm"] = replace(CONFIG, attention="nsa", **APART, qk_norm=False)

each = pytest.mark.parametrize("name", VARIANTS)


def make_mixer(name: str, dtype: torch.dtype = torch.float64) -> TokenMixer:
    """A mixer with random weights, so that every weight has an effect."""
    torch.manual_seed(1)
    config = VARIANTS[name]
    mixer = MIXERS[config.attention].from_config(config).to(dtype)
    for parameter in mixer.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return mixer.eval()


@each
def test_prefixes_do_not_depend_on_what_follows(name: str) -> None:
    """At every length, and so around every border of a block; the gradient across it is exactly zero."""
    mixer, x = make_mixer(name), torch.randn(1, LENGTH, 32, dtype=torch.float64)
    whole = mixer(x)
    changed = torch.randn_like(x)
    for t in range(1, LENGTH):
        torch.testing.assert_close(mixer(x[:, :t]), whole[:, :t], rtol=1e-10, atol=1e-10)
        other = mixer(torch.cat([x[:, :t], changed[:, t:]], dim=1))
        torch.testing.assert_close(other[:, :t], whole[:, :t], rtol=1e-10, atol=1e-10)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(mixer(leaf)[:, :t].sin().sum(), leaf)
        assert (grad[:, t:] == 0).all()


def chunks_of(sizes: list[int], length: int) -> Iterator[tuple[int, int]]:
    """Chunks of the given sizes, followed by single tokens."""
    start = 0
    for size in [*sizes, *[1] * length]:
        end = min(start + size, length)
        if start < end:
            yield start, end
        start = end


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(list(VARIANTS)),
    sizes=st.lists(st.integers(1, 30), max_size=4),
    documents=st.booleans(),
    padding=st.sampled_from(["none", "left", "between"]),
    full=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("_", range(6))  # parts that workers share
def test_decoding_equals_the_whole(
    _: int, name: str, sizes: list[int], documents: bool, padding: str, full: bool, seed: int
) -> None:
    mixer = make_mixer(name)
    torch.manual_seed(seed)
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    ids = masks.make_documents(2, LENGTH) + 5 if documents else None
    pads = masks.make_padding(padding, 2, LENGTH)
    with torch.no_grad():
        expected, cache, out = mixer(x, ids, pads), mixer.new_cache(2, full), []
        for start, end in chunks_of(sizes, LENGTH):
            here = (None if y is None else y[:, start:end] for y in (ids, pads))
            out.append(mixer(x[:, start:end], *here, cache))
    out = torch.cat(out, dim=1)
    if pads is not None:  # what a padded position gives means nothing
        out, expected = out[~pads], expected[~pads]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert cache.length.tolist() == [LENGTH] * 2


@each
def test_rows_of_a_cache_can_be_chosen(name: str) -> None:
    mixer, x = make_mixer(name), torch.randn(2, 40, 32, dtype=torch.float64)
    rows = torch.tensor([1, 0, 1])
    with torch.no_grad():
        cache = mixer.new_cache(2)
        mixer(x[:, :30], cache=cache)
        cache.select(rows)
        out = torch.cat([mixer(x[rows, t : t + 1], cache=cache) for t in range(30, 40)], dim=1)
        torch.testing.assert_close(out, mixer(x)[rows, 30:], rtol=1e-9, atol=1e-9)


@each
def test_documents_are_apart_and_padding_is_not_seen(name: str) -> None:
    """Documents begin at multiples of every block, where all mixers see them as if alone."""
    mixer, x = make_mixer(name), torch.randn(1, LENGTH, 32, dtype=torch.float64)
    documents = torch.tensor([[0] * 16 + [1] * 32 + [0] * 22])
    packed = mixer(x, documents)
    apart = torch.cat([mixer(part) for part in x.split([16, 32, 22], dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)
    padding = torch.zeros(1, LENGTH, dtype=torch.bool)
    padding[:, 20:24] = True
    changed = torch.where(padding[..., None], torch.randn_like(x), x)
    outs = [mixer(y, padding=padding)[~padding] for y in (x, changed)]
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    empty = mixer(x[:, :5], padding=torch.ones(1, 5, dtype=torch.bool))
    assert empty.isfinite().all()


@each
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    """By a multiple of every block, so that the grid of blocks stands as without; rotation is relative."""
    mixer, x = make_mixer(name), torch.randn(1, LENGTH, 32, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, 32, 32, dtype=torch.float64), x], dim=1)
    padding = torch.arange(LENGTH + 32)[None] < 32
    torch.testing.assert_close(mixer(padded, padding=padding)[:, 32:], mixer(x), rtol=1e-9, atol=1e-9)


@each
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    mixer = make_mixer(name)
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, :30] = True
    mixer(x, padding=padding).sin().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("documents", [False, True])
def test_compiles_to_one_graph(name: str, documents: bool) -> None:
    mixer, x = make_mixer(name), torch.randn(2, LENGTH, 32, dtype=torch.float64, requires_grad=True)
    ids = masks.make_documents(2, LENGTH) if documents else None
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (compiled, mixer):
        out = forward(x, ids)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *mixer.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each
def test_wrong_inputs(name: str) -> None:
    mixer = make_mixer(name)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for wrong, message in (
        (x[:, :0], r"expected x \[B, N >= 1, 32\]"),
        (x[..., :30], r"expected x \[B, N >= 1, 32\]"),
        (x.float(), "expected x torch.float64 on cpu as the weights, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer(wrong)
    with pytest.raises(ValueError, match="padding: expected bool"):
        mixer(x, padding=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="documents: expected"):
        mixer(x, documents=torch.zeros(2, 4, dtype=torch.long))
    assert mixer(x[:0]).shape == (0, 5, 32)
    cache = mixer.new_cache(2)
    mixer(x, cache=cache)
    with pytest.raises(ValueError, match="x: expected 2 sequences as in the cache, got 1"):
        mixer(x[:1], cache=cache)
    with torch.no_grad():
        assert mixer(x, cache=cache).shape == x.shape  # and the cache goes on


@each
def test_sizes_are_what_a_cache_holds_and_a_query_sees(name: str) -> None:
    mixer, config = make_mixer(name, torch.float32), VARIANTS[name]
    with torch.no_grad():
        cache = mixer.new_cache(1)
        mixer(torch.randn(1, LENGTH, 32), cache=cache)
    if config.attention == "dma":
        held = sum(x.numel() for x in (cache.state.key, cache.state.value, cache.state.key_bias))
    elif config.attention == "nsa":
        kept = [*cache.tokens._kept.values(), *cache.window._kept.values(), *cache._waiting, *cache._compressed]
        held = sum(x.numel() for x in kept)
    else:
        held = sum(x.numel() for x in cache._kept.values())
    assert held == mixer.cache_elements(LENGTH)
    # One key more for every query costs its product and that with its value.
    widths = {"mla": 6 + 4 + 8}.get(config.attention, 16)
    t = torch.arange(LENGTH)
    keys = {"dma": (t + 1).clamp(max=9), "swa": (t + 1).clamp(max=9), "mha": t + 1, "mla": t + 1}
    if config.attention in keys:
        assert mixer.mixing_flops(LENGTH) == pytest.approx(2 * 4 * widths * keys[config.attention].double().mean())


def test_sliding_window_and_all_of_the_past_equal_sdpa() -> None:
    x, t = torch.randn(2, LENGTH, 32, dtype=torch.float64), torch.arange(LENGTH)
    for name, window in (("mha", LENGTH), ("swa", 9)):
        mixer = make_mixer(name)
        q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q, k = (apply_rope(norm(y).transpose(1, 2), 1e4) for norm, y in ((mixer.q_norm, q), (mixer.k_norm, k)))
        band = (t <= t[:, None]) & (t > t[:, None] - window)
        expected = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=band, enable_gqa=True)
        expected = mixer.o_proj(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("window", [1, 9, LENGTH, LENGTH + 5])
def test_dynamic_masks_without_a_score_are_a_sliding_window(window: int, backend: str) -> None:
    shape = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "backend": backend}
    dma = DynamicMaskAttention(keep_window_size=window, **shape).double()
    swa = SlidingWindowAttention(sliding_window=window, **shape).double()
    swa.load_state_dict({name: x for name, x in dma.state_dict().items() if name in swa.state_dict()})
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    documents = masks.make_documents(2, LENGTH)
    for arguments in ((x,), (x, documents)):
        torch.testing.assert_close(dma(*arguments), swa(*arguments), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("interleave", [False, True])
def test_latent_attention_equals_deepseek_v3(interleave: bool) -> None:
    ours = make_mixer("mla", torch.float32)
    config = DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=None,
        qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, rope_interleave=interleave, attention_bias=False,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = DeepseekV3Attention(config, layer_idx=0).eval()
    state = ours.state_dict()
    if interleave:  # theirs rotates pairs: its channel 2 i and 2 i + 1 are ours i and i + 2
        order = torch.tensor([0, 2, 1, 3])
        q = state["q_proj.weight"].unflatten(0, (4, 10))
        state["q_proj.weight"] = torch.cat([q[:, :6], q[:, 6:][:, order]], dim=1).flatten(0, 1)
        kv = state["kv_a_proj_with_mqa.weight"]
        state["kv_a_proj_with_mqa.weight"] = torch.cat([kv[:12], kv[12:][order]])
    theirs.load_state_dict(state)
    theirs.kv_a_layernorm.variance_epsilon = ours.kv_a_layernorm.eps
    x = torch.randn(2, 20, 32)
    places = DeepseekV3RotaryEmbedding(config)(x, torch.arange(20)[None])
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x, places, mask)[0], rtol=1e-5, atol=1e-5)


@each
def test_text_of_a_model_is_that_of_its_full_forward(name: str) -> None:
    """Token by token through the generation of the model, with a ragged batch."""
    torch.manual_seed(3)
    model = DogeForCausalLM(replace(VARIANTS[name], num_hidden_layers=2, intermediate_size=48)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    prompt = torch.randint(256, (2, 30))
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1, :11] = True
    tokens = model.generate(prompt, 40, padding=padding)
    text = torch.cat([prompt, tokens], dim=1)
    with torch.no_grad():
        logits = model(text, padding=F.pad(padding, (0, 40)))
    assert torch.equal(logits[:, 29:-1].argmax(-1), tokens)
    assert model.flops_per_token > 6 * model.num_non_embedding_parameters


def test_arguments_that_an_attention_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"attention_args: expected what attention 'swa' takes, got \{'window': 3\}"):
        ModelConfig(attention="swa", attention_args={"window": 3})


def test_an_unknown_attention_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"attention: expected one of \['dma', 'mha', 'swa', 'mla', 'nsa'\], got 'mla2'"
    ):
        ModelConfig(attention="mla2")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention": "swa", "sliding_window": 0}, "sliding_window: expected at least 1, got 0"),
        ({"attention": "mla", "kv_lora_rank": 0}, "kv_lora_rank, qk_nope_head_dim and v_head_dim >= 1"),
        ({"attention": "mla", "qk_rope_head_dim": 3}, "qk_rope_head_dim: rotary embedding needs an even number"),
        ({"attention": "nsa", "nsa_compress_stride": 3}, "to be multiples of nsa_compress_stride, got 8, 8 and 3"),
        ({"attention": "nsa", "nsa_select_count": 0}, "expected block sizes and counts of at least 1"),
        ({"attention": "nsa", "nsa_window": 0}, "nsa_window and nsa_compress_hidden >= 1, got 0 and 16"),
        ({"attention": "mha", "backend": "fast"}, "backend: expected one of"),
    ],
)
def test_wrong_sizes(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DogeForCausalLM(replace(CONFIG, **changed))


def test_a_ring_holds_the_last_positions() -> None:
    cache, values = PositionCache(1, window=4), torch.arange(11.0)
    for start, end in ((0, 2), (2, 3), (3, 7), (7, 8), (8, 9), (9, 11)):
        kept, keys, _ = cache.extend(None, x=values[start:end].view(1, 1, -1, 1))
        assert {*range(max(0, end - 4), end)} <= {*keys.position.tolist()}
        assert kept["x"].flatten().tolist() == keys.position.tolist()
        assert sorted(cache._position.tolist()) == [*range(max(0, end - 4), end)]
    with pytest.raises(ValueError, match="expected batch >= 0 and window >= 1"):
        PositionCache(1, window=0)


def old_mixer(base: type[TokenMixer]) -> type[TokenMixer]:
    """A mixer as written before `Packing` existed, which builds on what its base class provides."""

    class Old(base):
        @classmethod
        def of_config(cls, config: ModelConfig) -> "Old":
            return super().of_config(config)

        def forward(
            self,
            x: Tensor,
            documents: Tensor | None = None,
            padding: Tensor | None = None,
            cache: object = None,
        ) -> Tensor:
            assert documents is None or documents.shape == x.shape[:2]
            return 2 * super().forward(x, documents, padding, cache)

    return Old


def test_mixers_written_before_packings_go_on() -> None:
    x = torch.randn(2, 40, 32)
    documents, padding = torch.arange(40).expand(2, -1) // 13, torch.arange(40).expand(2, -1) >= 35
    with pytest.warns(FutureWarning, match="Old: of_config is called from_config and forward takes `packing`") as told:
        once = old_mixer(DynamicMaskAttention)
    assert [x.filename for x in told] == [__file__]
    with pytest.warns(FutureWarning):
        twice = old_mixer(once)
    ours = DynamicMaskAttention.from_config(CONFIG)
    expected = ours(x, Packing.of(documents, padding))
    for kind, factor in ((once, 2), (twice, 4)):
        mixer = kind.of_config(CONFIG)
        assert type(mixer) is type(kind.from_config(CONFIG)) is kind
        mixer.load_state_dict(ours.state_dict())
        torch.testing.assert_close(mixer(x, documents, padding), factor * expected)


def test_documents_and_padding_come_in_many_ways() -> None:
    mixer, x = DynamicMaskAttention.from_config(CONFIG), torch.randn(2, 40, 32)
    documents, padding = torch.arange(40).expand(2, -1) // 13, torch.arange(40).expand(2, -1) >= 35
    packing = Packing.of(documents, padding)
    expected = mixer(x, packing)
    for found in (
        mixer(x, documents, padding),
        mixer(x, documents, padding, None),
        mixer(x, documents=documents, padding=padding),
        mixer(x, packing=packing, cache=None),
        mixer.forward(x, documents, padding),
    ):
        assert torch.equal(found, expected)
    assert torch.equal(mixer.lifetimes(x, documents, padding)[0].death, mixer.lifetimes(x, packing)[0].death)
    assert torch.equal(mixer(x, Packing()), mixer(x))
    with pytest.raises(ValueError, match="expected either documents and padding or a packing, got both"):
        mixer(x, packing, padding)
    with pytest.raises(ValueError, match=r"documents: expected shape \[2, 40\]"):
        mixer(x, documents[:, 1:], padding)
    with pytest.raises(ValueError, match=r"expected x \[B, N >= 1, 32\]"):
        mixer(x[:, :0], documents[:, :0], padding[:, :0])
    with pytest.raises(ValueError, match="expected both documents and runs"):
        Packing(documents)


def test_sizes_of_a_rule_have_their_names_in_configurations() -> None:
    mixer, x = DynamicMaskAttention.from_config(CONFIG), torch.randn(1, 40, 32)
    before, mixer.keep_window_size = mixer(x), 2
    assert (mixer.keep.window, mixer.keep_last, mixer.sinks) == (2, CONFIG.keep_last, CONFIG.sinks)
    assert not torch.equal(mixer(x), before)
    with pytest.raises(ValueError, match="keep_window_size: expected at least 1, got 0"):
        mixer.keep_window_size = 0
    with pytest.raises(ValueError, match="expected the sizes that the cache was made with"):
        mixer.new_cache(1).keep_window_size = 3
