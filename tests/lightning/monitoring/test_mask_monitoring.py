"""Figures, pictures and texts of dynamic masks: against the dense mask, and without effect on training."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from small_run import PLAIN
from tensorboard.plugin_util import markdown_to_safe_html
from test_monitoring import ROOT, events, fit, values
from torch import Tensor, nn

from dma_kernels import Lifetimes, reference_mask
from dma_lightning.cli import build_cli
from dma_lightning.config import ModelConfig
from dma_lightning.data.base import Batch
from dma_lightning.generation import stream_tokens
from dma_lightning.model import DogeForCausalLM
from dma_lightning.monitoring import DynamicMaskMonitor, SampleMonitor
from dma_lightning.monitoring.recording import RecordedMask, record_masks
from dma_lightning.monitoring.samples import best_kept, marked_text, mask_picture, spread, text_pieces
from dma_lightning.tokenizers import ByteTokenizer

N, W = 63, 7
DOCUMENTS = torch.arange(N)[None] // 25
PADDING = torch.arange(N)[None] < 5
TRAINER = SimpleNamespace(precision_plugin=pl.plugins.Precision())


def small_model(**changes: int | float | str) -> DogeForCausalLM:
    """A model with two layers whose ranks differ."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "keep_window_size": W}
    model = DogeForCausalLM(ModelConfig(**shape | changes))
    for name, p in model.named_parameters():
        if name.endswith((".A", "dt_proj.weight")):
            nn.init.normal_(p)
    return model


def recorded(sequence: Batch, **changes: int) -> dict[int, RecordedMask]:
    """Masks of a small model over a sequence."""
    return record_masks(TRAINER, small_model(**changes), sequence)


def sequence(**extra: Tensor) -> Batch:
    """Random tokens."""
    return {"input_ids": torch.randint(0, 256, (1, N)), **extra}


@pytest.mark.parametrize("extra", [{}, {"documents": DOCUMENTS}, {"documents": DOCUMENTS, "padding": PADDING}])
@pytest.mark.parametrize("keep_last", [0, 2])
def test_figures_are_those_of_the_dense_mask(extra: dict[str, Tensor], keep_last: int) -> None:
    for mask in recorded(sequence(**extra), keep_last=keep_last).values():
        dense, causal = mask.lifetimes.to_dense()[0], mask.causal.to_dense()[0, 0]  # [G, N, N] and [N, N]
        heads, own = dense.shape[0], dense.diagonal(dim1=1, dim2=2)
        real = causal.diagonal()
        full = real & (causal.sum(1) > W + keep_last)
        expected = {
            "live_fraction": dense.sum() / (heads * causal.sum()),
            "births": own[:, full].float().mean(),
            "own_key": own[:, real].float().mean(),
            "mean_lifetime": dense.sum(1)[own].float().mean(),
        }
        figures = mask.figures()
        assert {name: x.item() for name, x in figures.items()} == pytest.approx(
            {name: x.item() for name, x in expected.items()}
        )
        assert 0 < figures["births"] <= figures["own_key"] <= 1
        assert torch.allclose(mask.kept_shares()[real], (dense.sum(1) / causal.sum(0).clamp(min=1)).mean(0)[real])


def test_intervals_go_on_after_a_resume(tmp_path: Path) -> None:
    fit(tmp_path)
    fit(tmp_path, "--trainer.max_steps=5", "--ckpt_path=last")
    read = events(tmp_path)
    looked = {x.step for tag in read.Tags()["scalars"] if tag.startswith("dma/") for x in read.Scalars(tag)}
    assert max(x.step for x in read.Scalars("train/loss")) == 4
    assert looked
    assert max(looked) < 3  # before the resume, and not again before step 100


def test_no_births_where_nothing_is_ever_dropped() -> None:
    figures = recorded(sequence(), keep_window_size=N)[0].figures()
    assert figures["births"].isnan()
    assert figures["live_fraction"] == figures["own_key"] == 1


def test_recorded_masks_are_those_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, seen = small_model(), sequence(documents=DOCUMENTS, padding=PADDING), []
    found = record_masks(TRAINER, model, batch)

    def noted(ranks: Tensor, **selection: Tensor | int | None) -> Tensor:
        seen.append(reference_mask(ranks, **selection))
        return seen[-1]

    monkeypatch.setattr("dma_lightning.backends.reference_mask", noted)
    for layer in model.layers:
        layer.self_attn.backend = "reference"
    model(**batch)
    assert len(seen) == len(found) == 2
    assert all(torch.equal(mask, found[i].lifetimes.to_dense()) for i, mask in enumerate(seen))


def test_recording_leaves_no_trace() -> None:
    model = small_model(hidden_dropout=0.5).train()
    for layer in model.layers:
        layer.compile(backend="eager")
    x = torch.randint(0, 256, (1, N))
    model(x)
    compiled = [layer._compiled_call_impl for layer in model.layers]
    model.layers[1].mlp.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    first, again = (record_masks(TRAINER, model, {"input_ids": x}) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [layer._compiled_call_impl for layer in model.layers] == compiled
    assert all(compiled)
    assert set(first) == {0, 1}
    assert all(torch.equal(first[i].scores, again[i].scores) for i in first)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.layers)
    assert all(p.grad is None for p in model.parameters())


def test_the_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    weights = []
    for name, options in (
        ("with", []),
        ("without", PLAIN),
    ):
        (tmp_path / name).mkdir()
        cli = fit(tmp_path / name, "--trainer.max_steps=4", "--model.hidden_dropout=0.1", *options)
        weights.append(cli.model.state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items() if name.startswith("model."))


def test_monitors_keep_their_intervals(tmp_path: Path) -> None:
    monitors = [
        *PLAIN,
        "--fit_report={}",
        "--mask_monitor.every_n_steps=4",
        "--sample_monitor.every_n_validations=3",
        "--sample_monitor.layers=1",
        "--sample_monitor.max_new_tokens=0",
    ]
    intervals = ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=3", "--trainer.max_steps=16"]
    fit(tmp_path, *monitors, *intervals)
    read = events(tmp_path)
    assert [event.step for event in read.Scalars("dma/layer_1/own_key")] == [2, 8, 14]  # the 3rd, 9th and 15th
    shown = [event.step for event in read.Images("masks/layer_0")]
    validated = [event.step for event in read.Scalars("val/loss")]
    assert shown == [validated[0], validated[3], validated[6], validated[7]]  # every third, and the last
    assert read.Tags()["images"] == ["masks/layer_0"]
    assert read.Tags()["tensors"] == ["kept/layer_0/text_summary"]
    assert values(read, "dma/layer_0/own_key")[0] <= 1


def test_a_sample_takes_as_many_passes_whatever_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that share the weights would wait for each other."""
    monkeypatch.setitem(stream_tokens.__wrapped__.__kwdefaults__, "chunk_size", 4)
    model, passes = small_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    SampleMonitor(max_new_tokens=3)._show_continuation(None, 0, SimpleNamespace(model=model), sequence(), None)
    assert len(passes) == 3


def test_data_without_text_shows_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = [f"--config={ROOT}/configs/{name}.yaml" for name in ("model/mqar", "data/mqar", "trainer/mqar")]
    limits = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
    build_cli(["fit", *layers, *limits, "--data.batch_size=2", "--trainer.logger.init_args.name=cpu"])
    (event,) = events(tmp_path / "runs").Tensors("sample/continuation/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    prompt, rest = text.removeprefix("<pre>").split("<strong>")
    assert len([int(word) for word in prompt.split()]) == 32
    assert len([int(word) for word in rest.split("</strong>")[0].split()]) == 40


def test_picture_shows_the_mask() -> None:
    birth = torch.arange(4, dtype=torch.int32).expand(1, 3, -1)
    death = torch.tensor([[[3, 2, 2, 4], [4, 4, 4, 4], [0, 1, 2, 3]]], dtype=torch.int32)
    scores = torch.zeros(1, 3, 4)
    picture = mask_picture(RecordedMask(Lifetimes(birth, death, 4), Lifetimes.causal(4), scores, 4), 2, 4)
    assert picture.shape == (3, 256, 2 * 256 + 8)
    red = picture[0, ::64]  # one row for each query
    first, second = red[:, :256:64], red[:, 264::64]
    live, dead, future = 0.13, 0.87, 1.0
    rows = [[live, future, future, future], [live, live, future, future], [live, dead, dead, future]]
    assert torch.allclose(first, torch.tensor([*rows, [dead, dead, dead, live]]))
    assert torch.allclose(second, torch.full((4, 4), live).tril() + torch.full((4, 4), future).triu(1))
    assert mask_picture(RecordedMask(Lifetimes(birth, death, 4), Lifetimes.causal(4), scores, 4), 1, 2).shape[1] == 256


def test_tensorboard_shows_texts_as_they_are() -> None:
    pieces = ["a <b>", "&amp;", " *x*", "\n\n# no title\n", "| `t`", "é"]
    shown = markdown_to_safe_html(marked_text(pieces, [True, True, False, False, True, False]) + "\n\nmore")
    text = "<pre><strong>a &lt;b&gt;&amp;amp;</strong> *x*\n\n# no title\n<strong>| `t`</strong>é</pre>"
    assert shown.replace("&#10;", "\n").startswith(text)
    assert shown.endswith("<p>more</p>")
    assert marked_text([]) == "<pre></pre>"


def test_pieces_are_the_text_of_each_token() -> None:
    text = "né 🙂!"
    pieces = text_pieces(ByteTokenizer(), list(text.encode()))
    assert pieces == ["n", "", "é", " ", "", "", "", "🙂", "!"]
    assert text_pieces(ByteTokenizer(), list(text.encode())[:-2]) == ["n", "", "é", " ", "", "", "�"]
    assert text_pieces(ByteTokenizer(), []) == []
    assert text_pieces(None, [3, 14]) == ["3 ", "14 "]


def test_best_kept_leaves_the_last_keys_out() -> None:
    kept = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.4, 1.0, 1.0])
    assert best_kept(kept, 2, 0.34).nonzero().flatten().tolist() == [1, 3]
    assert not best_kept(kept, 8, 0.5).any()
    assert not best_kept(kept, 99, 0.5).any()


def test_spread_takes_both_ends() -> None:
    assert spread([3, 4, 5, 6, 7], 3) == [3, 5, 7]
    assert spread([3, 4], 3) == [3, 4]
    assert spread([3, 4, 5], 1) == [3]
    assert spread([], 2) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicMaskMonitor(0), "every_n_steps: expected at least 1, got 0"),
        (lambda: SampleMonitor(every_n_validations=0), "every_n_validations: expected at least 1, got 0"),
        (lambda: SampleMonitor(heads=0), "heads: expected at least 1, got 0"),
        (lambda: SampleMonitor(picture_length=0), "picture_length: expected at least 1, got 0"),
        (lambda: SampleMonitor(kept_share=1.0), "kept_share between 0 and 1, got 40 and 1.0"),
        (lambda: SampleMonitor(max_new_tokens=-1), "expected max_new_tokens >= 0"),
    ],
)
def test_numbers_out_of_range(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
