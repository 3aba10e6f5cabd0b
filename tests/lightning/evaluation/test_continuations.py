"""Likelihoods equal those of whole sequences. Texts equal those of prompts that are continued one at a time."""

import itertools
import random
from typing import Any

import pytest
import torch
from small_models import ATTENTIONS, SHAPE, make_model

from dma_lightning.evaluation import Reader
from dma_lightning.evaluation.continuations import Continuing, Pair, continued_texts, likelihoods
from dma_lightning.generation import generate
from dma_lightning.sampling import Sampling

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A tokenizer in which each token is a letter."""

    vocab_size = SHAPE.vocab_size

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode_stream(self, tokens: Any, after: Any = ()) -> Any:
        for token in tokens:
            yield LETTERS[token]
        yield ""


def random_tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(SHAPE.vocab_size), k=count))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 7), (3, 64), (100, 11)])
@torch.no_grad()
def test_likelihoods_are_those_of_whole_sequences(attention: str, batch_size: int, chunk_size: int) -> None:
    model, draw = make_model(attention), random.Random(3)
    lengths = [(1, 1), (1, 12), (30, 1), (30, 4), (17, 9), (63, 2), (5, 5)]
    pairs = [Pair(random_tokens(draw, a), random_tokens(draw, b)) for a, b in lengths]
    pairs += [Pair(pairs[2].context, (token,)) for token in range(SHAPE.vocab_size)]  # every answer of one token
    pairs += [Pair(pair.context, pair.continuation) for pair in pairs[3:5]]
    found = likelihoods(Reader(model, chunk_size=chunk_size), pairs, batch_size)
    for pair, (nats, greedy) in zip(pairs, found, strict=True):
        logits = model(torch.tensor([pair.inputs]))[0, len(pair.context) - 1 :]
        labels = torch.tensor(pair.continuation)
        expected = logits.log_softmax(-1).gather(1, labels[:, None]).sum().item()
        assert nats == pytest.approx(expected, abs=1e-9)
        assert greedy == bool((logits.argmax(-1) == labels).all())
    every = found[len(lengths) : len(lengths) + SHAPE.vocab_size]
    assert sum(greedy for _, greedy in every) == 1
    assert torch.tensor([nats for nats, _ in every]).exp().sum() == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_texts_end_before_stop_strings_and_end_tokens(batch_size: int) -> None:
    model, draw = make_model("dma"), random.Random(5)
    prompts = [random_tokens(draw, count) for count in (3, 20, 1, 9, 14)]
    whole = [generate(model, torch.tensor([prompt]), 25)[0].tolist() for prompt in prompts]
    texts = ["".join(LETTERS[token] for token in tokens) for tokens in whole]
    stop, end = texts[0][4:6], whole[1][7]
    reader = Reader(model, chunk_size=8)

    def made(**how: Any) -> list[str]:
        return continued_texts(reader, Letters(), prompts, Continuing(25, Sampling(), **how), batch_size)

    assert made() == texts
    assert made(stop=(stop,)) == [text.partition(stop)[0] for text in texts]
    assert made(end_tokens=(end,)) == [text.partition(LETTERS[end])[0] for text in texts]
    cut = [min(text.partition(stop)[0], text.partition(LETTERS[end])[0], key=len) for text in texts]
    assert made(stop=(stop,), end_tokens=(end,)) == cut
    assert len({len(text) for text in cut}) > 1


def test_no_step_is_made_after_the_last_text_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("dma")
    prompts = [(1, 2, 3), (4,)]
    texts = [generate(model, torch.tensor([prompt]), 20)[0].tolist() for prompt in prompts]
    stops = tuple(LETTERS[tokens[place]] for tokens, place in zip(texts, (3, 6), strict=True))
    last = max(
        next(place for place, token in enumerate(tokens) if LETTERS[token] in stops) for tokens in texts
    )  # of the tokens that must be seen
    steps = itertools.count()
    forward = type(model).forward

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        next(steps)
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    continued_texts(Reader(model), Letters(), prompts, Continuing(20, Sampling(), stops), 2)
    assert next(steps) == last + 1  # the prompts, and a step for each later token
