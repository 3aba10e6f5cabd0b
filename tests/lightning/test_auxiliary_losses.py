"""Losses of layers train as if they were added to the main loss, however that is scaled and computed."""

from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import pytest
import torch
from test_metrics import quiet_trainer, small_model
from test_step_means import Labeled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from dma_kernels import Packing
from dma_lightning import MIXERS, LanguageModel, SlidingWindowAttention
from dma_lightning.auxiliary_losses import _scale, end_auxiliary_losses, lead_auxiliary_losses, with_auxiliary_loss
from dma_lightning.callbacks import GradientGuard

WEIGHT = 0.3


class Layer(nn.Module):
    """A layer with its own loss, which trains only `content`."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.content = nn.Linear(8, 8), nn.Linear(8, 1)

    def own_loss(self, x: Tensor) -> Tensor:
        return (self.content(x.detach()) - 1).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        loss = self.own_loss(x)
        return with_auxiliary_loss(self.mix(x).tanh(), loss, WEIGHT)


@pytest.fixture
def layers() -> nn.ModuleList:
    return nn.ModuleList([Layer(), Layer()]).double()


def expected(layers: nn.ModuleList, x: Tensor, factor: float) -> list[Tensor]:
    """Gradients of the sum of all losses."""
    total = torch.zeros((), dtype=x.dtype)
    for layer in layers:
        total = total + WEIGHT * layer.own_loss(x)
        x = layer.mix(x).tanh()
    return list(torch.autograd.grad(factor * (x.square().mean() + total), list(layers.parameters())))


def run(layer: nn.Module, x: Tensor, how: str) -> Tensor:
    if how == "reentrant":
        return checkpoint(layer, x, use_reentrant=True)
    return checkpoint(layer, x, use_reentrant=False) if how.startswith("checkpoint") else layer(x)


@pytest.mark.parametrize(
    "how", ["eager", "checkpoint", "reentrant", "compile-eager", "compile-aot_eager", "checkpoint-aot_eager"]
)
def test_gradients_are_those_of_the_sum(layers: nn.ModuleList, how: str) -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    if "-" in how:
        for layer in layers:
            layer.compile(backend=how.split("-")[1], fullgraph=True)
    for factor in (1.0, 0.25, 3.0):  # a compiled backward keeps no factor
        layers.zero_grad()
        y = x
        for layer in layers:
            y = run(layer, y, how)
        loss = y.square().mean()
        lead_auxiliary_losses(loss)
        (loss * factor).backward()
        end_auxiliary_losses()
        found = [p.grad for p in layers.parameters()]
        torch.testing.assert_close(found, expected(layers, x, factor), rtol=1e-12, atol=1e-14)


def test_a_loss_that_nobody_leads_has_its_own_weight(layers: nn.ModuleList) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    layers[1](layers[0](x)).square().mean().backward()
    torch.testing.assert_close([p.grad for p in layers.parameters()], expected(layers, x, 1.0))


def test_the_output_is_unchanged_and_without_gradients_there_is_no_graph(layers: nn.ModuleList) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(layers[0](x), layers[0].mix(x).tanh())
    with torch.no_grad():
        loss = layers[0](x).sum()
        assert not loss.requires_grad
        lead_auxiliary_losses(loss)


@pytest.mark.parametrize("loss", [torch.ones(1), torch.tensor(1)])
def test_what_is_no_loss_is_refused(loss: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a floating scalar"):
        with_auxiliary_loss(torch.ones(3), loss)


class Own(SlidingWindowAttention):
    """A mixer with its own loss."""

    auxiliary_parameters = ("content.weight",)
    strength = 1.0

    @classmethod
    def from_config(cls, config: Any) -> Self:
        mixer = super().from_config(config)
        mixer.content = nn.Linear(config.hidden_size, 1, bias=False)
        return mixer

    def own_loss(self, x: Tensor) -> Tensor:
        return self.strength * (self.content(x.detach()) - 1).square().mean()

    def forward(self, x: Tensor, packing: Packing | None = None, cache: Any = None) -> Tensor:
        out = super().forward(x, packing, cache=cache)
        if self.training and torch.is_grad_enabled() and cache is None:
            return with_auxiliary_loss(out, self.own_loss(x), WEIGHT)
        return out


class Watch(pl.Callback):
    """Records the gradients of content and of everything else, before and after clipping, and the logged norm."""

    def __init__(self) -> None:
        self.content: list[Tensor] = []
        self.others: list[Tensor] = []
        self.norms: list[Tensor] = []

    def _add(self, module: pl.LightningModule) -> None:
        named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
        self.content += [grad.clone() for name, grad in named if "content" in name]
        self.others.append(torch.cat([grad.flatten() for name, grad in named if "content" not in name]))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self._add(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self._add(pl_module)
        self.norms += [x for name, x in trainer.callback_metrics.items() if name == "grad_norm"]


LABELS = [32, 1, 7, 0]


def fit(model: LanguageModel, accumulate: int = 1, **options: object) -> Watch:
    """Train one step on all sequences."""
    watch = Watch()
    options = {"precision": "64-true", "callbacks": [watch]} | options
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate, log_every_n_steps=1, **options)
    trainer.fit(model, DataLoader(Labeled(LABELS), batch_size=4 // accumulate))
    return watch


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type[Own]:
    monkeypatch.setitem(MIXERS, "own", Own)
    return Own


def gradient_of_content(model: LanguageModel, accumulate: int) -> Tensor:
    """Gradient of the mean of the mixer's loss over batches, weighted by their labels."""
    data, total = Labeled(LABELS), torch.zeros((), dtype=torch.float64)
    layer, size = model.model.layers[0], 4 // accumulate
    for first in range(0, 4, size):
        ids = torch.stack([data[i]["input_ids"] for i in range(first, first + size)])
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        total = total + WEIGHT * layer.self_attn.own_loss(x) * sum(LABELS[first : first + size]) / sum(LABELS)
    return torch.autograd.grad(total, layer.self_attn.content.weight)[0]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_weigh_it_as_the_main_loss(own: type[Own], accumulate: int, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = small_model(lr=1e-300, attention="own", activation_checkpointing=checkpointing)
    found = fit(model, accumulate)
    torch.testing.assert_close(
        found.content[-1], gradient_of_content(model.double(), accumulate), rtol=1e-9, atol=1e-12
    )
    assert found.content[-1].norm() > 0.01
    assert _scale.held == 1


def test_compiled_layers_of_a_run(own: type[Own]) -> None:
    torch.manual_seed(0)
    model = small_model(lr=1e-300, attention="own")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    found = fit(model, 4)
    torch.testing.assert_close(found.content[-1], gradient_of_content(model.double(), 4), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("algorithm", "optimizer"), [("norm", "adamw"), ("value", "adamw"), ("norm", "muon")])
def test_its_gradient_is_clipped_apart(
    own: type[Own], monkeypatch: pytest.MonkeyPatch, algorithm: str, optimizer: str
) -> None:
    runs = []
    for strength in (1.0, 1e4):
        monkeypatch.setattr(own, "strength", strength)
        torch.manual_seed(0)
        options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
        runs.append(fit(small_model(lr=1e-300, attention="own", optimizer=optimizer), **options))
    for found in runs:
        before, after = (runs[0].content[0], runs[0].others[0]), (found.content[-1], found.others[-1])
        assert min(x.norm() for x in before) > 0.01
        order = 2 if algorithm == "norm" else torch.inf
        assert all(0.0099 < x.norm(order) <= 0.01 for x in after)
        assert torch.equal(found.others[-1], runs[0].others[-1])
        assert found.norms[-1] == pytest.approx(found.others[0].norm().item(), rel=1e-6)


def test_a_step_that_is_left_out_has_nothing_to_clip(own: type[Own], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "strength", torch.nan)
    torch.manual_seed(0)
    model = small_model(lr=1.0, attention="own")
    before = [p.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"content\.weight is not finite"):
        fit(model, callbacks=[GradientGuard(not_finite="skip")], gradient_clip_val=0.5)
    assert all(torch.equal(x.double(), y.double()) for x, y in zip(before, model.parameters(), strict=True))


def test_evaluation_computes_none(own: type[Own], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(own, "own_loss", fail)
    loader = DataLoader(Labeled(LABELS), batch_size=4)
    quiet_trainer(default_root_dir=tmp_path).validate(small_model(attention="own"), loader, verbose=False)
