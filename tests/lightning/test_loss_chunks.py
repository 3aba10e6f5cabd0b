"""A loss computed in chunks equals the whole loss, and memory holds the logits of only one chunk."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from small_run import SIZES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dma_lightning import LanguageModel
from dma_lightning.losses import chunked_scores, token_losses
from dma_lightning.step_memory import least_step_bytes

VOCABULARY, BATCH, LENGTH = 96, 2, 37
TOKENS = BATCH * LENGTH
CHUNKS = [1, 32, TOKENS - 1, TOKENS, 1000]


def batch() -> dict[str, Tensor]:
    """Sequences with documents and padding. A third of the labels, and all labels of one chunk, are ignored."""
    drawn = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=drawn)
    labels[:, ::3] = labels[:, 2:35] = -100
    documents, padding = (torch.arange(LENGTH).expand(BATCH, -1) > 20).long(), torch.zeros(BATCH, LENGTH).bool()
    padding[:, -1] = True
    return {"input_ids": tokens, "labels": labels, "documents": documents, "padding": padding}


def module(**options: object) -> LanguageModel:
    """A small model in float64, with the same weights each time."""
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=VOCABULARY, max_position_embeddings=64, **SIZES, **options)
    return model.double()


def step(model: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step."""
    loss = model.training_step(batch(), 0)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_are_the_whole(chunk: int, tied: bool) -> None:
    whole, chunked = (module(tie_word_embeddings=tied, loss_chunk=size) for size in (None, chunk))
    torch.testing.assert_close(step(chunked), step(whole), rtol=0, atol=1e-10)
    with torch.no_grad():
        found, wanted = (model._scores(batch(), predict=True) for model in (chunked, whole))
        torch.testing.assert_close(found.losses, wanted.losses, rtol=0, atol=1e-10)
        assert torch.equal(found.tokens, wanted.tokens)
        predicted, labels = chunked.predict_step(batch(), 0), batch()["labels"]
        assert torch.equal(predicted["label_log_probs"], -found.losses)
    assert (found.losses[labels == -100] == 0).all()


def test_compiled_and_recomputed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = module(loss_chunk=30, compile_layers=True, activation_checkpointing=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model.configure_model()
        torch.testing.assert_close(step(model), step(module()), rtol=0, atol=1e-10)


def test_frozen_heads_and_layers() -> None:
    for trained in ("lm_head", "layers"):
        whole, chunked = module(tie_word_embeddings=False), module(tie_word_embeddings=False, loss_chunk=10)
        for model in (whole, chunked):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained in name)
        torch.testing.assert_close(step(chunked), step(whole), rtol=0, atol=1e-10)


def test_validation_and_test_report_the_same() -> None:
    rows = [{name: x[i] for name, x in batch().items()} for i in range(BATCH)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    found = []
    for chunk in (None, 9):
        trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, precision="64-true", **quiet)
        loader = torch.utils.data.DataLoader(rows, batch_size=BATCH)
        model = module(loss_chunk=chunk)
        found.append(trainer.validate(model, loader, verbose=False) + trainer.test(model, loader, verbose=False))
    assert found[1] == [pytest.approx(figures, rel=1e-10) for figures in found[0]]
    assert "val/accuracy" in found[0][0]


def test_gradients_under_autocast_are_as_near_as_without_chunks() -> None:
    """Sums over chunks in bfloat16 would be much farther."""
    torch.manual_seed(0)
    head, x = torch.nn.Linear(16, VOCABULARY, bias=False), torch.randn(1, 4096, 16)
    labels = torch.randint(VOCABULARY // 8, (1, 4096))

    def gradients(chunk: int | None, enabled: bool = True) -> list[Tensor]:
        read, weight = x.clone().requires_grad_(), head.weight
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scored = chunked_scores(head, read, labels, chunk).losses if chunk else token_losses(head(read), labels)
        return list(torch.autograd.grad(scored.mean(), (read, weight)))

    for exact, whole, chunked in zip(gradients(None, enabled=False), gradients(None), gradients(16), strict=True):
        assert chunked.dtype == torch.float32
        assert 0 < (chunked - exact).norm() <= 1.2 * (whole - exact).norm()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        out = func(*args, **kwargs or {})
        self.numbers = max([self.numbers, *(x.numel() for x in tree_iter(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("chunk", [None, 8])
def test_memory_holds_the_logits_of_one_chunk(chunk: int | None) -> None:
    head, tokens, vocabulary = torch.nn.Linear(4, 512, bias=False), 900, 512
    x, labels = torch.randn(1, tokens, 4, requires_grad=True), torch.randint(vocabulary, (1, tokens))
    kept: list[int] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        losses = chunked_scores(head, x, labels, chunk).losses if chunk else token_losses(head(x), labels)
        losses.sum().backward()
    if chunk is None:
        assert largest.numbers == max(kept) == tokens * vocabulary
        return
    assert largest.numbers == chunk * vocabulary
    assert sum(kept) == tokens * (4 + 1)  # inputs and labels
    with Largest() as largest, torch.no_grad():
        chunked_scores(head, x, labels, chunk, predict=True)
    assert largest.numbers == chunk * vocabulary


def test_the_bound_of_a_step_counts_one_chunk() -> None:
    model = module().model
    whole, *chunked = (least_step_bytes(model, BATCH, LENGTH, 4, loss_chunk=chunk) for chunk in (None, 10, 1000))
    assert whole - chunked[0] == 2 * VOCABULARY * (TOKENS - 10) * 4
    assert whole == chunked[1]


@pytest.mark.parametrize("chunk", [0, -3, 2.5, True])
def test_chunks_of_no_tokens_are_refused(chunk: object) -> None:
    with pytest.raises(ValueError, match=rf"loss_chunk: expected a whole number of tokens, at least 1, .* got {chunk}"):
        module(loss_chunk=chunk)
