"""Dynamic mask attention as one function, and the examples in the docs."""

import re
import shutil
from pathlib import Path

import masks
import pytest
import small_run
import torch

from dma_kernels import reference_attention, reference_mask
from dma_kernels.ranks import as_integers
from dma_lightning import dynamic_mask_attention
from dma_lightning.monitoring import draw_text_masks
from dma_lightning.trained_models import load_with_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a byte-level model that has trained a few steps on text."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_run.make(folder, "--data.sequence_length=64")
    return folder / small_run.CHECKPOINTS / "last.ckpt"


def inputs(length: int) -> list[torch.Tensor]:
    """q, k, v and ranks, all requiring gradients."""
    shapes = [(2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8), (2, 2, length)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("case", [masks.CASES[0], masks.CASES[7]], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_definition(case: masks.Case, scale: float | None) -> None:
    q, k, v, ranks = inputs(60)
    given = case.arguments(2, 60)
    mask = reference_mask(ranks, 9, **given)
    for form, bias in {"exp": ranks.exp(), "linear": ranks}.items():
        found = dynamic_mask_attention(q, k, v, ranks, 9, score_form=form, scale=scale, **given)
        expected = reference_attention(q, k, v, bias, mask, scale)
        gradients = [torch.autograd.grad(out.sin().sum(), (q, k, v, ranks)) for out in (found, expected)]
        for one, other in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
            torch.testing.assert_close(one, other)
    alone = dynamic_mask_attention(q, k, v, ranks, 9, key_bias=torch.zeros_like(ranks), backend="reference", **given)
    torch.testing.assert_close(alone, reference_attention(q, k, v, torch.zeros_like(ranks), mask))
    by_integers = dynamic_mask_attention(q, k, v, as_integers(ranks), 9, key_bias=ranks, **given)
    torch.testing.assert_close(by_integers, reference_attention(q, k, v, ranks, mask))


def test_mistakes_are_told() -> None:
    q, k, v, ranks = inputs(8)
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'tirton'"):
        dynamic_mask_attention(q, k, v, ranks, 4, backend="tirton")
    with pytest.raises(ValueError, match="keep_window_size: expected at least 1, got 0"):
        dynamic_mask_attention(q, k, v, ranks, 0)
    with pytest.raises(ValueError, match="ranks: expected floating or int64"):
        dynamic_mask_attention(q, k, v, ranks.int(), 4, key_bias=ranks)
    with pytest.raises(
        ValueError, match=r"ranks: expected floating-point numbers to compute biases from, .*, also give a key_bias"
    ):
        dynamic_mask_attention(q, k, v, ranks.long(), 4)
    with pytest.raises(ValueError, match="k: expected"):
        dynamic_mask_attention(q, k[:, :, :-1], v, ranks[..., :-1], 4)
    with pytest.raises(ValueError, match=r"ranks: expected \[2, 2, 8\] to match k, got \[1, 2, 8\]"):
        dynamic_mask_attention(q, k, v, ranks[:1], 4)
    with pytest.raises(ValueError, match="score_form: expected one of"):
        dynamic_mask_attention(q, k, v, ranks, 4, score_form="square", key_bias=ranks)


@pytest.mark.parametrize("page", ["attention.md", "evaluation.md"])
def test_examples_of_the_pages_run(
    page: str, text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(text_checkpoint, "last.ckpt")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    for example in examples:
        exec(example, names)
    if page == "attention.md":
        assert names["out"].shape == (2, 8, 300, 64)
        assert names["dt"].grad is not None
    else:
        assert Path("masks.png").read_bytes().startswith(b"\x89PNG")


def test_masks_over_a_text(text_checkpoint: Path) -> None:
    module, tokenizer = load_with_tokenizer(text_checkpoint, "cpu")
    config = module.model.config
    figure = draw_text_masks(module, tokenizer, "0123456789ab")
    assert len(figure.axes) == config.num_hidden_layers * config.num_key_value_heads
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list("0123456789ab")
    with pytest.raises(ValueError, match="text: expected at least one token, got none"):
        draw_text_masks(module, tokenizer, "")
    with pytest.raises(ValueError, match=r"layers: expected some of \[0\], got \[7\]"):
        draw_text_masks(module, tokenizer, "abc", layers=[7])
