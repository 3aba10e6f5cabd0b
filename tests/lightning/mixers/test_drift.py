"""Ranks and biases that drift, against their definition."""

import math
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dma_kernels import KeepRule, Packing, key_ranks, reference_mask
from dma_kernels.ranks import as_integers
from dma_lightning.config import ModelConfig
from dma_lightning.language_model import LanguageModel
from dma_lightning.mixers import MIXERS
from dma_lightning.mixers.base import merge_heads
from dma_lightning.mixers.drift import Drift, DriftingCache, add_up
from dma_lightning.mixers.retention import RetentionQueries, retention_loss
from dma_lightning.model import DogeForCausalLM
from dma_lightning.monitoring import SampleMonitor
from dma_lightning.monitoring.drifts import drift_of

WINDOW = 7


def mixer(attention: str, **options: Any) -> Any:
    """A float64 mixer with three KV heads of two query heads each. No parameter has its initial value."""
    options = {"keep_window_size": WINDOW, "sliding_window": WINDOW, "score_form": "linear"} | options
    shape = {"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    torch.manual_seed(0)
    layer = MIXERS[attention].from_config(ModelConfig(attention=attention, **shape, **options)).double()
    layer.place(1, 3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(length: int, packed: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(length)
    x = torch.randn(2, length, 12, dtype=torch.float64)
    if not packed:
        return x, None, None
    documents = (torch.rand(2, length) < 0.1).cumsum(1)
    return x, documents, torch.rand(2, length) < 0.15


def definition(layer: Any, x: Tensor, documents: Tensor | None, padding: Tensor | None) -> Tensor:
    """Everything computed with whole matrices. A loop adds up the steps, in whole units of 2^-32 nats."""
    q, k, v = layer.queries_keys_values(x, None)
    ranking = getattr(layer, "drifting", None)
    drift = layer.drift if ranking is None else ranking.drift
    pre = drift.rate[:, None] if drift.weight is None else drift.weight @ x.mT + drift.rate[:, None]
    step = pre.exp() / WINDOW if drift.weight is None else F.softplus(pre).clamp(max=8)
    total, units, sums = torch.zeros(2, 3, dtype=x.dtype), torch.zeros(2, 3, dtype=torch.int64), []
    places = []
    for t in range(x.shape[1]):
        at = step[..., t] if step.ndim == 3 else step[:, 0].expand(2, 3)
        real = 1.0 if padding is None else (~padding[:, t, None]).double()
        whole = (at.detach() * 2**32).round()
        at = at + (whole / 2**32 - at).detach()
        total = total + at * real * drift.drifts
        units = units + (whole * real * drift.drifts).long()
        sums.append(total)
        places.append(units)
    drifted, order = torch.stack(sums, -1), torch.stack(places, -1)  # [B, G, N]
    rank = torch.zeros_like(drifted)
    bias, far_content = drifted, torch.zeros_like(drifted)
    window = layer.window if ranking is None else layer.keep.window
    if ranking is not None:
        published = layer.A[:, None] * F.softplus((v.transpose(1, 2).flatten(2) @ layer.dt_proj.weight.T).mT)
        content = published if ranking.weight is None else 8 * torch.tanh(ranking.weight @ x.mT / 8)
        memories = ~drift.drifts[:, None]
        rank = published
        if ranking.stripes:  # of the second of three layers
            first = ranking.memory_heads // ranking.memory_every
            own = [[(t - first - g) % ranking.stripes == 0 for t in range(x.shape[1])] for g in range(3)]
            rank = rank + 4.0 * (torch.tensor(own) & memories)
        rank = torch.where(memories, as_integers(rank), (content * 2**32).round().long() + order)
        of_memories = published.exp() if layer.score_form == "exp" else published
        bias = torch.where(memories, of_memories, drifted + (content if ranking.content_in_bias is True else 0))
        if ranking.content_in_bias == "far":
            far_content = content.masked_fill(memories, 0)
    rule = {} if ranking is None else {"keep_last": layer.keep.last, "sinks": layer.keep.sinks}
    mask = reference_mask(
        rank, keep_window_size=window or x.shape[1], documents=documents, padding=padding, **rule
    ).repeat_interleave(2, dim=1)
    if ranking is None and window is not None:  # a window counts padded positions, too
        place = torch.arange(x.shape[1])
        near = place[:, None] - place < window
        mask = near & reference_mask(
            rank, keep_window_size=x.shape[1], documents=documents, padding=padding
        ).repeat_interleave(2, dim=1)
    k, v, drifted, bias, far_content = (y.repeat_interleave(2, dim=1) for y in (k, v, drifted, bias, far_content))
    place = torch.arange(x.shape[1])
    is_far = place[:, None] - place >= rule.get("keep_last", 0)
    logits = q @ k.mT / 2 + bias[:, :, None] - drifted[..., None] + far_content[:, :, None] * is_far
    logits = logits.masked_fill(~mask, -torch.inf)
    seen = mask.any(-1, keepdim=True)
    weights = torch.where(seen, logits, 0).softmax(-1) * seen
    return layer.o_proj(merge_heads(weights @ v))


FORMS = [
    ("dma", {}),
    ("dma", {"content_in_bias": False, "content": "input"}),
    ("dma", {"content": "input", "keep_window_size": WINDOW - 3, "keep_last": 3}),
    ("dma", {"memory_heads": 1, "score_form": "exp", "sinks": 1}),
    ("dma", {"memory_heads": 2, "content": "input"}),
    ("dma", {"memory_heads": 2, "memory_every": 2}),
    ("dma", {"memory_heads": 2, "memory_stripes": 3, "keep_window_size": WINDOW - 3, "keep_last": 3}),
    ("swa", {}),
    ("mha", {}),
]
FAR = {"content": "input", "content_in_bias": "far", "keep_window_size": WINDOW - 3, "keep_last": 3}
TRAINED = [*FORMS, ("dma", FAR), ("dma", FAR | {"content": "values", "memory_heads": 1, "sinks": 2})]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("drift", ["constant", "gate"])
@pytest.mark.parametrize(("attention", "options"), TRAINED)
def test_outputs_and_gradients_are_those_of_the_definition(
    attention: str, options: dict[str, Any], drift: str, packed: bool
) -> None:
    layer = mixer(attention, drift=drift, **options)
    x, documents, padding = inputs(33, packed)
    x.requires_grad_()
    target = torch.randn(2, 33, 12, dtype=torch.float64)
    if padding is not None:
        target[padding] = 0
    found, expected = layer(x, documents=documents, padding=padding), definition(layer, x, documents, padding)
    parameters = [x, *layer.parameters()]
    gradients = [torch.autograd.grad((out * target).sum(), parameters, allow_unused=True) for out in (found, expected)]
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(found[real], expected[real], atol=1e-9, rtol=1e-9)
    for one, other in zip(*gradients, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("sizes", [[33], [1] * 33, [5, 1, 1, 20, 6]])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("attention", "options"), FORMS)
def test_chunks_and_steps_are_the_whole_sequence(
    attention: str, options: dict[str, Any], packed: bool, sizes: list[int]
) -> None:
    layer = mixer(attention, drift="gate", **options)
    x, documents, padding = inputs(33, packed)
    with torch.no_grad():
        whole = layer(x, documents=documents, padding=padding)
        for full in (False, True):
            cache, parts = layer.new_cache(2, full), []
            assert isinstance(cache, DriftingCache)
            for part in torch.arange(33).split(sizes):
                cut = [None if y is None else y[:, part] for y in (documents, padding)]
                parts.append(layer(x[:, part], documents=cut[0], padding=cut[1], cache=cache))
            real = slice(None) if padding is None else ~padding
            torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-9, rtol=1e-9)
            cache.select(torch.tensor([1, 0, 1]))
            assert cache.total.shape == (3, 3)
            assert cache.total.dtype == torch.int64
            assert cache.length.tolist() == [33] * 3


@pytest.mark.parametrize(
    ("form", "drift", "rate"),  # of a gate: steps of 0, of the input's choice, and of 8 nats
    [
        (0, "gate", -2.0), (2, "gate", -math.inf), (2, "constant", 2.0), (4, "gate", -2.0), (0, "gate", 100.0),
        (7, "gate", 100.0), (7, "constant", -1.0), (8, "gate", -2.0),
    ],
)  # fmt: skip
def test_after_ten_million_positions_a_cache_goes_on_as_from_none(form: int, drift: str, rate: float) -> None:
    layer = mixer(FORMS[form][0], drift=drift, **FORMS[form][1]).requires_grad_(False)
    nn.init.constant_(drift_of(layer).rate, rate)
    x, documents, padding = inputs(40, packed=True)

    def read(sizes: list[int], total: int) -> Tensor:
        cache, parts = layer.new_cache(2), []
        cache.total += total * drift_of(layer).drifts  # of heads that do
        for part in torch.arange(40).split(sizes):
            parts.append(layer(x[:, part], documents[:, part], padding[:, part], cache))
        return torch.cat(parts, 1)[~padding]

    whole = layer(x, documents=documents, padding=padding)[~padding]
    for allowed in (1e-7, 1e-5):
        near, *far = (
            read([1] * 40, 0),
            *(read(sizes, 10_000_000 * 8 << 32) for sizes in ([1] * 40, [25, 1, 1, 3, 10])),
        )
        if allowed == 1e-7:
            torch.testing.assert_close(near, whole, atol=1e-9, rtol=1e-9)
        for found in far:
            torch.testing.assert_close(found, near, atol=allowed, rtol=allowed)
        layer, x = layer.float(), x.float()


@pytest.mark.parametrize(("attention", "options"), [FORMS[0], ("swa", {}), ("mha", {})])
def test_a_nan_step_shows_from_its_position_on(attention: str, options: dict[str, Any]) -> None:
    layer = mixer(attention, drift="gate", **options).requires_grad_(False)
    drift, x = drift_of(layer), inputs(33, packed=False)[0]
    steps = drift(x)
    steps[:, 1, 9] = torch.nan
    start = 0

    def given(x: Tensor, padding: Tensor | None = None) -> Tensor:
        return steps[..., start : start + x.shape[1]]

    with patch.object(drift, "forward", given):
        assert layer(x)[:, 9:].isnan().all()
        cache = layer.new_cache(2)
        for count in (5, 1, 7, 20):
            out = layer(x[:, start : start + count], cache=cache)
            shown = torch.arange(start, start + count) >= 9
            assert torch.equal(out.isnan().all(-1), shown.expand(2, -1))
            start += count
        units, nats = add_up(steps)
        assert torch.equal(units[:, 1, 9], units[:, 1, 8])
        assert nats.isnan().sum() == 2 * (33 - 9)


def test_sums_of_steps_have_the_gradients_of_sums() -> None:
    steps = torch.rand(2, 3, 33, requires_grad=True)
    for start in (None, torch.full((2, 3), 7 << 40)):
        units, nats = add_up(steps, start)
        assert (units.dtype, nats.dtype, units.requires_grad) == (torch.int64, torch.float64, False)
        offset = 0 if start is None else 7 * 2.0**8
        torch.testing.assert_close(nats, steps.double().cumsum(-1) + offset, atol=33 * 2.0**-33, rtol=0)
        weights = torch.randn(2, 3, 33, dtype=torch.float64)
        found = torch.autograd.grad((nats * weights).sum(), steps)[0]
        expected = weights.flip(-1).cumsum(-1).flip(-1)
        torch.testing.assert_close(found, expected.float(), atol=0, rtol=0)


@pytest.mark.parametrize("keep_last", [0, 3])
def test_without_content_dma_is_the_window_with_the_same_drift(keep_last: int) -> None:
    options = {"drift": "gate", "content": "input", "keep_last": keep_last, "keep_window_size": WINDOW - keep_last}
    dma, swa = (mixer(name, **options).float() for name in ("dma", "swa"))
    swa.load_state_dict({name.replace("drifting.", ""): x for name, x in dma.state_dict().items()}, strict=False)
    nn.init.zeros_(dma.drifting.weight)
    for name, parameter in swa.named_parameters():
        assert parameter.equal(dma.get_parameter(name.replace("drift.", "drifting.drift.")))
    x = inputs(50, packed=False)[0].float()
    torch.testing.assert_close(dma(x), swa(x), atol=0, rtol=0)


def test_a_gate_starts_as_the_constant_drift() -> None:
    model = ModelConfig(attention="swa", drift="gate", num_key_value_heads=2, drift_range=(0.5, 2.0))
    gate = MIXERS["swa"].from_config(model)
    constant = Drift("constant", 128, 2, 64, (0.5, 2.0))
    x = torch.randn(1, 5, 128)
    torch.testing.assert_close(gate.drift(x), constant(x))
    torch.testing.assert_close(constant(x)[0, :, 0] * 64, torch.tensor([0.5, 2.0]))


def test_drifts_are_geometric_over_heads_and_layers() -> None:
    config = ModelConfig(num_hidden_layers=3, num_key_value_heads=2, drift="constant", score_form="linear")
    layers = DogeForCausalLM(config).mixers
    rates = torch.stack([layer.drifting.drift.rate.detach().exp() for layer in layers])  # [layers, G]
    assert rates.min() == pytest.approx(0.125)
    assert rates.max() == pytest.approx(4.0)
    assert (rates[:, 0].max() < rates[:, 1].min()).item()  # a small and a large one in each
    ordered = rates.flatten().sort().values
    torch.testing.assert_close(ordered[1:] / ordered[:-1], torch.full((5,), 32 ** (1 / 5)))


def test_memories_are_in_the_layers_that_were_asked_for() -> None:
    config = ModelConfig(num_hidden_layers=4, drift="gate", memory_heads=0.5, memory_every=2)
    drifts = [layer.drifting.drift.drifts.tolist() for layer in DogeForCausalLM(config).mixers]
    assert drifts == [[False, True], [True, True]] * 2


def test_heads_remember_different_positions_and_together_all() -> None:
    """At the start, before contents are learned: keys of the last `keep_last` positions, and those of its stripe."""
    options = {"drift": "gate", "memory_heads": 2, "memory_stripes": 4, "keep_window_size": 9, "keep_last": 4}
    seen = []
    for layer in range(2):
        options |= {"attention": "dma", "hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 3}
        attention = MIXERS["dma"].from_config(ModelConfig(**options))
        attention.place(layer, 2)
        mask = attention.lifetimes(torch.randn(1, 40, 12))[0].to_dense()[0]
        for head in range(2):
            seen.append(mask[head, -1])
            far = seen[-1][:-4].nonzero()[:, 0]
            assert (far % 4 == 2 * layer + head).all()
            assert len(far) == 9  # all that there are
    assert torch.stack(seen).any(0).all()


def test_without_a_drift_nothing_is_there() -> None:
    torch.manual_seed(0)
    names = DogeForCausalLM(ModelConfig()).state_dict().keys()
    assert not [name for name in names if "drift" in name]
    assert [type(cache) for cache in DogeForCausalLM(ModelConfig()).new_cache(1)].count(DriftingCache) == 0


def test_steps_are_bounded_and_padding_takes_none() -> None:
    drift = Drift("gate", 4, 2, 8, (1.0, 1.0))
    nn.init.constant_(drift.weight, 100.0)
    steps = drift(torch.ones(1, 3, 4), torch.tensor([[False, True, False]]))
    assert steps.tolist() == [[[8, 0, 8]] * 2]
    assert math.isclose(Drift("gate", 4, 1, 8, (1.0, 1.0))(torch.ones(1, 1, 4)).item(), 1 / 8, rel_tol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"memory_heads": 1}, {"content_in_bias": False}, {"retention_target": "output"}]
)
def test_a_retention_loss_trains_contents_alone(options: dict[str, Any]) -> None:
    """Its gradient is added to that of the main loss, for what contents are made of, and nothing else changes."""
    plain, trained = (
        mixer("dma", drift="gate", content="input", retention_weight=weight, **options) for weight in (0.0, 0.3)
    )
    trained.begin_step(5)
    x, documents, padding = inputs(63, packed=True)
    for layer in (plain, trained):
        layer(x, documents=documents, padding=padding).sum().backward()
    q, k, v = plain.queries_keys_values(x, None)
    published = key_ranks(v.detach(), plain.A, plain.dt_proj.weight)
    content = plain.drifting.content(x, published)
    drifted = plain.drifting.drift(x, padding).cumsum(-1)
    positions = RetentionQueries(WINDOW).at(5, 63)
    values = v.detach() if "retention_target" in options else None
    loss = retention_loss(q, k, content, drifted, positions, plain.keep, Packing.of(documents, padding), values)
    assert loss > 0
    (0.3 / 3 * loss).backward()  # of three layers
    gradients = [{name: p.grad for name, p in layer.named_parameters()} for layer in (plain, trained)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-10, rtol=1e-7, msg=name)
    alone = ("drifting.weight",) if options.get("content_in_bias") is False else ()
    assert tuple(trained.auxiliary_parameters) == alone


def test_a_retention_loss_is_the_same_where_every_key_is_kept_for_a_while() -> None:
    """As `MixedWindows` does: that is when far keys are attended to, and the loss has something to learn from."""
    gradients = []
    for every in (False, True):
        layer = mixer("dma", drift="gate", content="input", content_in_bias=False, retention_weight=0.3)
        if every:
            layer.keep = KeepRule(1000)
        layer(inputs(63, packed=False)[0]).sum().backward()
        gradients.append(layer.drifting.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_what_no_head_reads_is_not_computed(weight: float) -> None:
    """Neither ranks as published nor a gradient of x by contents that only rank; but each parameter has a gradient."""
    layer = mixer("dma", drift="gate", content="input", content_in_bias=False, retention_weight=weight)
    x = inputs(33, packed=False)[0].requires_grad_()
    with patch("dma_lightning.mixers.dynamic_mask.key_ranks", side_effect=AssertionError):
        layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert not layer.A.grad.any()
    assert not layer.dt_proj.weight.grad.any()
    assert layer.drifting.weight.grad.any() == (weight > 0)
    expected, layer.retention_weight = x.grad.clone(), 0.0
    for parameter in (layer.drifting.weight, layer.A, layer.dt_proj.weight):
        parameter.requires_grad_(False)
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(found, expected)


def test_a_retention_loss_is_for_training_alone() -> None:
    layer = mixer("dma", drift="gate", retention_weight=0.3).eval()
    with patch("dma_lightning.mixers.dynamic_mask.retention_loss", side_effect=AssertionError):
        layer(inputs(33, packed=False)[0])
        with torch.no_grad():
            layer.train()(inputs(33, packed=False)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention_weight": -0.1}, "retention_weight: expected at least 0, got -0.1"),
        ({"retention_target": "loss"}, r"retention_target: expected one of \['attention', 'output'\], got 'loss'"),
        ({"drift": "gate"}, "score_form: expected linear with a drift, .*got 'exp'"),
        (
            {"drift": "fast", "score_form": "linear"},
            "drift: expected one of .*'gate'.*, got 'fast'",
        ),
        ({"drift": "gate", "drift_range": (0.0, 1.0)}, r"drift_range: expected two numbers above 0"),
        ({"drift": "gate", "drift_range": (2.0, 1.0)}, r"drift_range: expected two numbers above 0"),
        ({"drift": "gate", "memory_heads": 3}, "memory_heads: expected 0 to 2 KV heads"),
        ({"drift": "gate", "memory_heads": 0.3}, "memory_heads: expected 0 to 2 KV heads, or a share"),
        ({"drift": "gate", "memory_heads": 1, "memory_every": 0}, "memory_every: expected at least 1, got 0"),
        ({"drift": "gate", "content": "keys"}, r"content: expected one of \['values', 'input'\], got 'keys'"),
        ({"drift": "gate", "memory_stripes": 4, "score_form": "linear"}, "memory_stripes: expected 0, or at least 1"),
        ({"drift": "gate", "memory_heads": 1, "memory_stripes": -1}, "memory_stripes: expected 0, or at least 1"),
        ({"memory_heads": 1}, r"drift: expected constant or gate with \{'memory_heads': 1\}, got none"),
        ({"content": "input"}, r"drift: expected constant or gate with \{'content': 'input'\}, got none"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIXERS["dma"].from_config(ModelConfig(**options))


def test_far_content_asks_for_last_positions_and_has_no_cache() -> None:
    options = {"drift": "gate", "score_form": "linear", "content": "input", "content_in_bias": "far"}
    with pytest.raises(ValueError, match="keep_last: expected at least 1 with content_in_bias far, got 0"):
        DogeForCausalLM(ModelConfig(**options))
    with pytest.raises(ValueError, match="expected true or false to generate or to use a cache, got far"):
        DogeForCausalLM(ModelConfig(keep_last=2, **options)).new_cache(1)
    with pytest.raises(ValueError, match="content_in_bias: expected true, false or far, got 'near'"):
        DogeForCausalLM(ModelConfig(keep_last=2, **options | {"content_in_bias": "near"}))


def test_texts_are_not_asked_of_far_content() -> None:
    model = {"drift": "gate", "score_form": "linear", "content": "input", "content_in_bias": "far", "keep_last": 2}
    module = LanguageModel(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1, **model)
    with pytest.raises(ValueError, match=r"max_new_tokens 0 with content_in_bias far.* --sample_monitor null"):
        SampleMonitor().setup(Mock(), module, "fit")
    SampleMonitor(max_new_tokens=0).setup(Mock(), module, "fit")
