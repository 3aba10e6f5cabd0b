"""Figures about drifts: against the definitions in float64, position by position, and as a callback."""

import math
from pathlib import Path
from statistics import mean, pstdev
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_lost_mass import packing_of
from test_monitoring import documented, events, fit, tags, values
from torch import Tensor, nn

from benchmarks.evidence.figures import record_of
from benchmarks.evidence.studies import Cell
from dma_kernels import Packing
from dma_lightning.config import ModelConfig
from dma_lightning.mixers.drift import Drift
from dma_lightning.model import DogeForCausalLM
from dma_lightning.monitoring import DriftMonitor
from dma_lightning.monitoring.drifts import DriftSums, drift_of, efolds
from dma_lightning.monitoring.recording import look_at_layers

G, C, WINDOW = 3, 5, 20
KINDS = ["", "documents", "padding", "documents and padding"]
MONITOR = "--trainer.callbacks+=dma_lightning.monitoring.DriftMonitor"
SECTION = "Drifts"


def random_drift(form: Any, without: int = 0) -> Drift:
    drift = Drift(form, C, G, WINDOW, (0.25, 8.0)).double()
    drift.place(0, 1, without)
    for parameter in drift.parameters():
        parameter.data += torch.randn_like(parameter) / 2
    return drift


def keys_of_queries(packing: Packing | None, row: int, length: int) -> list[list[int]]:
    """For each query, the unpadded keys of its document up to itself. None for a padded query."""
    runs = [0] * length if packing is None or packing.runs is None else packing.runs[row].tolist()
    padded = [False] * length if packing is None or packing.padding is None else packing.padding[row].tolist()
    seen = [[j for j in range(t + 1) if runs[j] == runs[t] and not padded[j]] for t in range(length)]
    return [[] if padded[t] else own for t, own in enumerate(seen)]


def efold(steps: list[float], keys: list[int]) -> int:
    """The e-folding distance of the last key's own query, from the steps of one head and row."""
    (*before, t), behind = keys, 0.0
    for j in range(t - 1, -1, -1):
        behind += steps[j + 1]
        if behind >= 1 and j in before:
            return t - j
    return len(steps)


def brute_force(
    steps: Tensor, heads: list[int], window: int, packing: Packing | None, content: Tensor | None = None
) -> dict[str, float]:
    """All figures by their definitions, from steps `[B, G, N]` and contents `[B, G, N]`."""
    real, ages = [], []
    for row in range(len(steps)):
        keys = keys_of_queries(packing, row, steps.shape[2])
        real += [(row, own[-1]) for own in keys if own]
        for own in filter(None, keys):
            whole = max(len(other) for other in keys if other and other[0] == own[0])
            if 2 * len(own) > whole:
                ages += [efold(steps[row, head].tolist(), own) for head in heads]
    ages.sort()
    lambdas = [window * mean(steps[row, head, t].item() for row, t in real) for head in heads]
    found = {"per_window": mean(lambdas), "per_window_min": min(lambdas), "per_window_max": max(lambdas)}
    found |= {f"efold_{percent}": ages[math.ceil(percent * len(ages) / 100) - 1] for percent in (10, 50, 90)}
    if content is not None:
        spreads = [pstdev(content[row, head, t].item() for row, t in real) for head in heads]
        found["spread"] = mean(x / y for x, y in zip(spreads, lambdas, strict=True))
    return found


def numbers(figures: dict[str, Tensor]) -> dict[str, float]:
    return {name: x.item() for name, x in figures.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "without", "form"), [(1, 0, "gate"), (63, 0, "constant"), (111, 1, "gate")])
def test_figures_by_brute_force(length: int, without: int, form: str, kind: str) -> None:
    drift, packing = random_drift(form, without), packing_of(kind if length > 1 else "", length)
    padding = None if packing is None else packing.padding
    x = torch.randn(2, length, C, dtype=torch.float64)
    steps, content = drift(x, padding).detach(), 3 + torch.randn(2, G, length, dtype=torch.float64)
    spoiled = content if padding is None else content.masked_fill(padding[:, None], torch.nan)
    found = numbers(DriftSums.of(drift, steps, length + 7, packing, spoiled).figures())
    expected = brute_force(steps, list(range(without, G)), WINDOW, packing, content)
    assert found == pytest.approx(expected, rel=1e-10)
    assert length == 1 or found["efold_10"] < found["efold_50"] <= found["efold_90"]
    del expected["spread"]
    assert numbers(DriftSums.of(drift, steps, length, packing).figures()) == pytest.approx(expected, rel=1e-10)


def test_efolds_end_with_the_document_and_need_a_whole_nat() -> None:
    steps = torch.full((1, 1, 20), 0.125)
    age, late = efolds(steps)
    assert age.tolist() == [[[20] * 8 + [8] * 12]]
    assert late.tolist() == [[False] * 10 + [True] * 10]
    documents = torch.tensor([[0] * 5 + [1] * 15])
    age, late = efolds(steps, Packing.of(documents))
    assert age.tolist() == [[[20] * 13 + [8] * 7]]
    assert late.tolist() == [[False] * 2 + [True] * 3 + [False] * 7 + [True] * 8]
    padding = torch.zeros(1, 20, dtype=torch.bool)
    padding[0, 10:13] = True  # is no key, but has positions
    age, late = efolds(steps.masked_fill(padding, 0), Packing.of(padding=padding))
    assert age[0, 0, 13:].tolist() == [11] * 5 + [8 + 3 * (t < 21) for t in range(18, 20)]
    assert not late[padding].any()


def test_long_sequences_lose_nothing_to_rounding() -> None:
    steps = torch.cat([torch.full((1, 1, 4000), 8.0), torch.full((1, 1, 1000), 0.09995)], -1)
    age, _ = efolds(steps)
    assert set(age[0, 0, 4011:].tolist()) == {11}
    rounded = steps.double().cumsum(-1).float()
    assert (rounded[..., 4010:] - rounded[..., 4000:-10] >= 1).any()  # sums of float32 would have 10, too


def test_a_nan_shows_and_no_position_has_no_figure() -> None:
    drift, steps = random_drift("gate"), torch.rand(1, G, 63)
    steps[0, 0, 30] = torch.nan
    figures = numbers(DriftSums.of(drift, steps, 63).figures())
    assert all(map(math.isnan, figures.values()))
    assert len(figures) == 6
    padding = torch.ones(1, 63, dtype=torch.bool)
    assert not DriftSums.of(drift, torch.zeros(1, G, 63), 63, Packing.of(padding=padding)).figures()


def model_of(attention: str, **options: Any) -> DogeForCausalLM:
    """A model in float64 with two layers of six query heads and three KV heads, and random drifts and contents."""
    shape = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 6}
    options = {"drift": "gate", "score_form": "linear", "keep_window_size": 9, "keep_last": 2} | options
    config = ModelConfig(attention=attention, **shape, num_key_value_heads=G, sliding_window=11, **options)
    model = DogeForCausalLM(config).double()
    for name, parameter in model.named_parameters():
        if "drift" in name or name.endswith((".A", "dt_proj.weight")):
            parameter.data += torch.randn_like(parameter) / 3
    return model


def watched(model: DogeForCausalLM, input_ids: Tensor, reduce: Any = lambda x, **_: x) -> dict[str, float]:
    """What the callback logs for a batch. `reduce` stands in for the other processes."""
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(model=model, log_dict=lambda figures, **_: logged.update(numbers(figures)))
    strategy = SimpleNamespace(reduce=reduce)
    trainer: Any = SimpleNamespace(
        strategy=strategy, precision_plugin=pl.plugins.Precision(), sanity_checking=False
    )  # fmt: skip
    monitor = DriftMonitor()
    monitor.on_validation_batch_start(trainer, module, {"input_ids": input_ids, "labels": input_ids}, 0)
    monitor.on_validation_epoch_end(trainer, module)
    return logged


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("dma", {"content": "input"}),
        ("dma", {"content": "values", "drift": "constant"}),
        ("dma", {"content": "input", "memory_heads": 1, "memory_every": 2}),
        ("swa", {}),
        ("mha", {"drift": "constant"}),
    ],
)
def test_every_mixer_with_a_drift_is_watched(attention: str, options: dict[str, Any]) -> None:
    model, input_ids = model_of(attention, **options), torch.randint(0, 256, (3, 63))
    logged = watched(model, input_ids)

    def look(mixer: Any, x: Tensor, packing: Packing | None) -> dict[str, float]:
        content = None
        if attention == "dma":
            content = mixer.content(x)
        steps, memories = drift_of(mixer)(x), 0 if mixer is model.mixers[1] else options.get("memory_heads", 0)
        return brute_force(steps, list(range(memories, G)), 11, packing, content)

    layers = dict(enumerate(model.mixers))
    seen = look_at_layers(
        SimpleNamespace(precision_plugin=pl.plugins.Precision()), model, layers, {"input_ids": input_ids}, look
    )
    expected = {f"drift/layer_{i}/{name}": x for i, layer in seen.items() for name, x in layer.items()}
    assert logged == pytest.approx(expected, rel=1e-9)


def test_figures_of_processes_are_those_of_their_sequences_together() -> None:
    model, input_ids = model_of("dma", memory_heads=1, memory_every=2), torch.randint(0, 256, (4, 63))
    sums: list[Tensor] = []
    alone = watched(model, input_ids[:1], lambda x, **_: sums.append(x.clone()) or x)
    rest = iter(sums)
    together = watched(model, input_ids[1:], lambda x, reduce_op: x + next(rest) if reduce_op == "sum" else None)
    assert together == pytest.approx(watched(model, input_ids), rel=1e-12)
    assert together["drift/layer_0/per_window"] != pytest.approx(alone["drift/layer_0/per_window"], rel=1e-6)


@pytest.mark.parametrize(
    ("attention", "options"),
    [("dma", {"drift": "none"}), ("mha", {"drift": "none"}), ("nsa", {"head_dim": 4}), ("dma", {"memory_heads": G})],
)
def test_without_a_drift_nothing_is_looked_at(attention: str, options: dict[str, Any]) -> None:
    model, ids = model_of(attention, **options), torch.randint(0, 256, (1, 63))
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    assert watched(model, ids) == {}


def test_layers_of_memories_alone_are_left_out() -> None:
    logged = watched(model_of("dma", memory_heads=G, memory_every=2), torch.randint(0, 256, (1, 63)))
    assert {name.split("/")[1] for name in logged} == {"layer_1"}


@pytest.mark.parametrize("attention", ["dma", "swa", "mha"])
def test_documented_figures(attention: str, tmp_path: Path) -> None:
    options = [f"--model.attention={attention}", "--model.drift=gate", "--model.score_form=linear", MONITOR]
    cli = fit(tmp_path, *options, "--model.drift_range=[0.5,2.0]", "--model.sliding_window=16")
    read = events(tmp_path)
    found = {tag for tag in tags(read) if tag.startswith("drift/")}
    assert found == documented(SECTION) - ({"drift/layer_0/spread"} if attention != "dma" else set())
    record = record_of(Cell("text", "tiny", attention, 0.1, 0), {}, "", tmp_path / "cpu/version_0", 0, {})
    curves = {tag: curve for tag, curve in record.curves.items() if tag.startswith("drift/")}
    assert {tag.replace("layer_1", "layer_0") for tag in curves} == found
    for curve in curves.values():
        assert [step for step, _ in curve] == [step for step, _ in record.curves["val/loss"]]
    batch, model = next(iter(cli.datamodule.val_dataloader())), cli.model.model

    def look(mixer: nn.Module, x: Tensor, packing: Packing | None) -> dict[str, float]:
        return brute_force(drift_of(mixer)(x).double(), [0, 1], 16, packing)

    trainer = SimpleNamespace(precision_plugin=pl.plugins.Precision())
    for i, figures in look_at_layers(trainer, model, dict(enumerate(model.mixers)), batch, look).items():
        for name, x in figures.items():
            assert values(read, f"drift/layer_{i}/{name}")[-1] == pytest.approx(x, rel=1e-5), name
        assert 0.4 < figures["per_window_min"] < figures["per_window_max"] < 2.5


def test_number_out_of_range() -> None:
    with pytest.raises(ValueError, match="sequences: expected at least 1, got 0"):
        DriftMonitor(sequences=0)
