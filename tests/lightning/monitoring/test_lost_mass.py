"""Lost mass of sampled queries: against dense attention in float64, and as a callback."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from test_monitoring import documented, events, fit, tags, values
from torch import Tensor, nn

from dma_kernels import KeepRule, Lifetimes, Packing, reference_mask
from dma_lightning.config import ModelConfig
from dma_lightning.mixers import DynamicMaskAttention
from dma_lightning.model import DogeForCausalLM
from dma_lightning.monitoring import LostMassMonitor
from dma_lightning.monitoring.lost_mass import LostMass, SampledQueries, efficiency, lost_mass
from dma_lightning.monitoring.recording import dynamic_layers, look_at_layers

B, H, G, D = 2, 4, 2, 8
TRAINER = SimpleNamespace(precision_plugin=pl.plugins.Precision())
MONITOR = "--trainer.callbacks+=dma_lightning.monitoring.LostMassMonitor"
SECTION = "Lost mass of dynamic masks"


def packing_of(kind: str, length: int) -> Packing | None:
    """Documents of unequal lengths, padding at both ends of one row and inside the other, both, or neither."""
    cut = torch.tensor([[length // 3], [2 * length // 3]])
    documents = (torch.arange(length) >= cut).long()
    padding = torch.zeros(B, length, dtype=torch.bool)
    padding[0, :3] = padding[0, -2:] = padding[1, length // 2 : length // 2 + 4] = True
    return Packing.of(
        documents if "documents" in kind else None, padding if "padding" in kind else None, batch=B, like=documents
    )


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and ranks, which are also the key biases."""
    shapes = ((B, H, length, D), (B, G, length, D), (B, G, length))
    q, k, ranks = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q, k, ranks


def allowed_keys(packing: Packing | None, row: int, t: int) -> list[int]:
    """The keys that query t may see, given documents and padding."""
    documents = None if packing is None else packing.runs
    padding = None if packing is None else packing.padding
    return [
        j
        for j in range(t + 1)
        if (documents is None or documents[row, j] == documents[row, t]) and (padding is None or not padding[row, j])
    ]


def brute_force(
    q: Tensor, k: Tensor, ranks: Tensor, kept: Tensor, allowed: list[int], place: tuple[int, int], budget: int
) -> tuple[Tensor, ...]:
    """M, M_window and M_best `[H]` of one query, and whether it sees its own key `[G]`."""
    row, t = place
    group, keys = torch.arange(H) // (H // G), torch.tensor(allowed)
    logits = torch.stack(
        [k[row, group[h], keys] @ q[row, h, t] / D**0.5 + ranks[row, group[h], keys] for h in range(H)]
    )
    attention = logits.softmax(-1)  # [H, allowed]
    lost = torch.stack([attention[h][~kept[row, group[h], t, keys]].sum() for h in range(H)])
    window = attention[:, : len(allowed) - budget].sum(-1)
    best = []
    for h in range(H):
        shared = attention[group == group[h]].mean(0)
        best.append(attention[h][shared.argsort(descending=True)[budget:]].sum())
    return lost, window, torch.stack(best), kept[row, :, t, t]


@pytest.mark.parametrize("kind", ["", "documents", "padding", "documents and padding"])
@pytest.mark.parametrize(("length", "keep"), [(63, KeepRule(7)), (111, KeepRule(5, 3, 2)), (40, KeepRule(1))])
def test_masses_are_those_of_dense_attention(kind: str, length: int, keep: KeepRule) -> None:
    q, k, ranks = inputs(length)
    packing, budget = packing_of(kind, length), keep.capacity
    found = lost_mass(q, k, ranks, Lifetimes.selected(ranks, keep, packing), packing, queries=9)
    given = {} if packing is None else {"documents": packing.documents, "padding": packing.padding}
    kept = reference_mask(ranks, keep.window, keep_last=keep.last, sinks=keep.sinks, **given)
    sample = SampledQueries.of(Lifetimes.causal(length, packing=packing), budget, 9)
    position = sample.position.expand(B, -1)
    compared = 0
    for row in range(B):
        for i, t in enumerate(position[row].tolist()):
            if not found.sampled[row, i]:
                continue
            allowed = allowed_keys(packing, row, t)
            assert len(allowed) > 2 * budget
            assert t in allowed
            expected = brute_force(q, k, ranks, kept, allowed, (row, t), budget)
            masses = (found.model, found.window, found.best, found.own_key)
            for x, y in zip(masses, expected, strict=True):
                torch.testing.assert_close(x[row, :, i], y, rtol=1e-11, atol=1e-13)
            compared += 1
    assert compared == found.sampled.sum() >= 9
    assert found.model.dtype == torch.float64
    shared = [x.unflatten(1, (G, -1)).mean(2) for x in (found.model, found.window, found.best)]
    assert (shared[2] <= shared[0] + 1e-12)[found.sampled[:, None].expand(-1, G, -1)].all()  # no keys lose less
    assert (shared[2] <= shared[1] + 1e-12)[found.sampled[:, None].expand(-1, G, -1)].all()


@pytest.mark.parametrize("kind", ["", "documents", "padding", "documents and padding"])
def test_equal_ranks_are_a_window(kind: str) -> None:
    q, k, ranks = inputs(63)
    packing, ranks = packing_of(kind, 63), torch.zeros_like(ranks)
    found = lost_mass(q, k, ranks, Lifetimes.selected(ranks, KeepRule(7), packing), packing)
    assert found.sampled.any()
    where = found.sampled[:, None].expand_as(found.model)
    assert torch.equal(found.model[where], found.window[where])
    assert found.head_efficiency().tolist() == [0, 0]
    assert found.own_key[found.sampled[:, None].expand_as(found.own_key)].all()


def test_queries_are_evenly_spaced_and_late() -> None:
    sample = SampledQueries.of(Lifetimes.causal(257), 16, 5)
    assert sample.position.tolist() == [[32 + (2 * i + 1) * 225 // 10 for i in range(5)]]
    assert sample.real.all()
    few = SampledQueries.of(Lifetimes.causal(35), 16, 5)
    assert few.position[few.real].tolist() == [32, 33, 34]
    assert not SampledQueries.of(Lifetimes.causal(32), 16, 5).real.any()
    documents = torch.tensor([[0] * 20 + [1] * 11, [0] * 5 + [1] * 26])
    causal = Lifetimes.causal(31, documents=documents)
    sample = SampledQueries.of(causal, 9, 4)
    assert [x[real].tolist() for x, real in zip(sample.position, sample.real, strict=True)] == [
        [18, 19],
        [24, 26, 28, 30],
    ]


def test_sums_and_efficiency() -> None:
    model, window, best = torch.tensor([[0.4, 9.0], [0.2, 9.0]]), torch.full((2, 2), 0.5), torch.full((2, 2), 0.1)
    own, sampled = torch.tensor([[True, False]]), torch.tensor([[True, False]])
    found = LostMass(model[None], window[None], best[None], own[None], sampled)
    assert found.sums().tolist() == pytest.approx([0.3, 0.5, 0.1, 1, 1])
    assert found.head_efficiency().tolist() == pytest.approx([0.5])
    nothing = efficiency(torch.tensor(0.5), torch.tensor(0.1), torch.tensor(0.1))
    assert nothing.isnan()
    half = LostMass(model[None], window[None], best[None], own[None].expand(1, 2, 2), sampled)
    assert half.head_efficiency().tolist() == pytest.approx([0.25, 0.75])


def test_half_precision_is_computed_in_single() -> None:
    q, k, ranks = (x.bfloat16() for x in inputs(63))
    lifetimes = Lifetimes.selected(ranks.float(), KeepRule(7))
    exact = lost_mass(q.double(), k.double(), ranks.double(), lifetimes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lost_mass(q, k, ranks, lifetimes)
    assert found.model.dtype == torch.float32
    for name in ("model", "window", "best"):
        where = found.sampled[:, None].expand_as(found.model)
        torch.testing.assert_close(
            getattr(found, name)[where].double(), getattr(exact, name)[where], rtol=1e-5, atol=1e-6
        )


def test_masses_explain_the_output_of_a_layer() -> None:
    """What a layer lost is by how much its output differs: o_all - o_kept = M (o_dropped - o_kept)."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "keep_window_size": 7}
    model = DogeForCausalLM(ModelConfig(**shape, num_attention_heads=H, num_key_value_heads=G)).double()
    for name, p in model.named_parameters():
        if name.endswith((".A", "dt_proj.weight")):
            nn.init.normal_(p)
    outputs = {}
    for i, layer in enumerate(model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: outputs.update({i: args[0]}))

    def look(mixer: DynamicMaskAttention, x: Tensor, packing: Packing | None) -> tuple[LostMass, Tensor, Tensor]:
        q, k, v = mixer.queries_keys_values(x, None)
        lifetimes, key_bias = mixer.lifetimes(x, packing)
        logits = q @ k.repeat_interleave(H // G, 1).mT / mixer.head_dim**0.5
        logits = logits + key_bias.repeat_interleave(H // G, 1)[:, :, None]
        causal = Lifetimes.causal(x.shape[1]).to_dense()
        full = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        dropped = full * ~lifetimes.to_dense().repeat_interleave(H // G, 1)
        v = v.repeat_interleave(H // G, 1)
        return lost_mass(q, k, key_bias, lifetimes, packing), full @ v, dropped @ v

    seen = look_at_layers(TRAINER, model, dynamic_layers(model), {"input_ids": torch.randint(0, 256, (B, 63))}, look)
    for i, (mass, full, dropped) in seen.items():
        t = SampledQueries.of(Lifetimes.causal(63), 7, 64)
        t = t.position[t.real]
        m = mass.model[..., : len(t), None]
        kept = outputs[i].unflatten(-1, (H, -1)).transpose(1, 2)[:, :, t]  # [B, H, Q, D]
        torch.testing.assert_close(full[:, :, t] - kept, dropped[:, :, t] - m * kept)


def test_contents_of_far_keys_are_not_added_to_near_ones() -> None:
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "keep_window_size": 5,
        "keep_last": 3,
    }
    drift = {"drift": "gate", "score_form": "linear", "content": "input", "content_in_bias": "far"}
    mixer = DynamicMaskAttention.from_config(ModelConfig(**shape, **drift))
    nn.init.normal_(mixer.drifting.weight)
    x, place = torch.randn(1, 50, 32), torch.arange(50)
    q, k, _ = mixer.queries_keys_values(x, None)
    lifetimes, far = mixer.lifetimes(x)
    near = mixer.near_bias(x)
    bias = torch.where(place[:, None] - place < 3, near[:, :, None], far[:, :, None]).repeat_interleave(2, 1)
    logits = q @ k.repeat_interleave(2, 1).mT / mixer.head_dim**0.5 + bias
    full = logits.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
    dropped = (full * ~lifetimes.to_dense().repeat_interleave(2, 1)).sum(-1)
    found = lost_mass(q, k, far, lifetimes, near_bias=near, distance=mixer.near_distance)
    torch.testing.assert_close(found.model[..., :34], dropped[..., 16:].float())


def test_documented_figures_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    cli = fit(tmp_path / "with", MONITOR)
    read = events(tmp_path / "with")
    (tmp_path / "without").mkdir()
    fit(tmp_path / "without")
    assert tags(read) - tags(events(tmp_path / "without")) == documented(SECTION)
    assert [x.step for x in read.Scalars("dma/layer_1/lost_mass")] == [x.step for x in read.Scalars("val/loss")]

    def look(mixer: DynamicMaskAttention, x: Tensor, packing: Packing | None) -> LostMass:
        q, k, _ = mixer.queries_keys_values(x, None)
        lifetimes, key_bias = mixer.lifetimes(x, packing)
        return lost_mass(q, k, key_bias, lifetimes, packing)

    batch, model = next(iter(cli.datamodule.val_dataloader())), cli.model.model
    for i, mass in look_at_layers(TRAINER, model, dynamic_layers(model), batch, look).items():
        queries = mass.sampled.sum()
        assert queries == 2 * (64 - 2 * 16)
        shares = {"lost_mass": mass.model, "lost_mass_window": mass.window, "lost_mass_best": mass.best}
        shares["own_key_late"] = mass.own_key.float()
        means = {name: x.mean(1)[mass.sampled].mean() for name, x in shares.items()}
        means["efficiency"] = efficiency(*list(means.values())[:3])
        for name, mean in means.items():
            assert values(read, f"dma/layer_{i}/{name}")[-1] == pytest.approx(mean.item(), rel=1e-4), name
        assert means["lost_mass_best"] < means["lost_mass"] < 1


@pytest.mark.parametrize("option", ["--model.attention=mha", "--model.keep_window_size=32"])
def test_nothing_where_nothing_is_dropped(option: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, MONITOR, option, "--trainer.val_check_interval=1")
    assert not tags(events(tmp_path)) & documented(SECTION)
    told = [str(x.message) for x in caught if "LostMassMonitor" in str(x.message)]
    assert len(told) == ("keep" in option)
    assert all("expected documents of more than 64 tokens, twice the 32 keys" in x for x in told)


def test_the_run_is_the_same_with_it(tmp_path: Path) -> None:
    weights = []
    for name, options in (("with", [MONITOR]), ("without", [])):
        (tmp_path / name).mkdir()
        cli = fit(tmp_path / name, "--model.hidden_dropout=0.1", "--trainer.val_check_interval=1", *options)
        weights.append(cli.model.state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items() if name.startswith("model."))


@pytest.mark.parametrize("name", ["sequences", "queries"])
def test_numbers_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        LostMassMonitor(**{name: 0})


def test_a_drift_far_into_a_text_is_seen_as_at_its_beginning() -> None:
    q, k = torch.randn(1, 4, 90, 8), torch.randn(1, 2, 90, 8)
    drift = torch.rand(1, 2, 90, dtype=torch.float64).cumsum(-1)
    mask = Lifetimes.top_w(torch.randn(1, 2, 90), 9)
    near, far = (lost_mass(q, k, drift + start, mask).model for start in (0.0, 1e6))
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-7)
