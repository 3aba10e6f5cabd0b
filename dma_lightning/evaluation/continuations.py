"""Continuations of contexts: how likely given continuations are, and what the model generates by itself.

B batch, N length, n positions of a chunk, P pairs of a batch, K labels of all pairs, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dma_lightning.evaluation.reading import Reader
from dma_lightning.generation import decode_until, pad_prompts, stream_tokens
from dma_lightning.losses import token_losses
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import Tokenizer


@dataclass(frozen=True)
class Pair:
    """A context, and a continuation to score; both have at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model reads: all but the last."""
        return (self.context + self.continuation)[:-1]


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        nats: logarithm of its probability.
        greedy: whether each of its tokens is the likeliest, given those before it.
    """

    nats: float
    greedy: bool


@dataclass(frozen=True)
class Continuing:
    """How texts are continued.

    Attributes:
        max_new_tokens: maximum number of tokens in a continuation.
        sampling: how tokens are chosen.
        stop: a continuation ends before the first of these strings.
        end_tokens: a continuation ends before the first of these tokens.
    """

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] = ()


def likelihoods(reader: Reader, pairs: Sequence[Pair], batch_size: int) -> list[Likelihood]:
    """How likely each continuation is after its context.

    Each batch has pairs of about the same length, and the longest are read first. Pairs with the same inputs, such as
    one-token answers to the same question, are read only once.

    Args:
        reader: reads the inputs.
        pairs: contexts with their continuations, any number of them.
        batch_size: number of different inputs to read at once.
    """
    asking: dict[tuple[int, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        asking.setdefault(pair.inputs, []).append(number)
    found: dict[int, Likelihood] = {}
    with reader.inferring():
        for batch in _batches(sorted(asking, key=len, reverse=True), batch_size, "reading"):
            numbers = [(row, number) for row, inputs in enumerate(batch) for number in asking[inputs]]
            nats, greedy = _scores(reader, batch, [(row, pairs[number].continuation) for row, number in numbers])
            for (_, number), *score in zip(numbers, nats.tolist(), greedy.tolist(), strict=True):
                found[number] = Likelihood(*score)
    return [found[number] for number in range(len(pairs))]


def continued_texts(
    reader: Reader, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], how: Continuing, batch_size: int
) -> list[str]:
    """The continuation of each prompt, decoded without the prompt.

    If the tokenizer drops a space at the beginning of every text, as SentencePiece does, this also drops the space that
    a continuation begins with.

    Args:
        reader: reads the prompts.
        tokenizer: the model's.
        prompts: the tokens of each prompt, at least one.
        how: how to continue.
        batch_size: number of prompts to continue at once. Prompts in a batch have about the same length.
    """
    found: dict[int, str] = {}
    longest_first = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    with reader.inferring():
        for batch in _batches(longest_first, batch_size, "generating"):
            texts = _continued(reader, tokenizer, [prompts[number] for number in batch], how)
            found.update(zip(batch, texts, strict=True))
    return [found[number] for number in range(len(prompts))]


def _scores(
    reader: Reader, inputs: Sequence[tuple[int, ...]], asked: Sequence[tuple[int, tuple[int, ...]]]
) -> tuple[Tensor, Tensor]:
    """Scores of continuations at the end of inputs; call it within `inferring`.

    Args:
        reader: reads the inputs.
        inputs: B of them. They are padded on the right, where causal attention does not look.
        asked: P pairs of a row of the inputs and a continuation. The inputs lack the last token of the continuation.

    Returns:
        The logarithm of each continuation's probability, float64 `[P]`, and whether each of its tokens is the likeliest
        one, bool `[P]`.
    """
    pair = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(tokens) for _, tokens in asked]))  # [K]
    row = torch.tensor([row for row, _ in asked])[pair]
    label = torch.tensor([token for _, tokens in asked for token in tokens])
    ends = [(len(inputs[row]), len(tokens)) for row, tokens in asked]
    position = torch.cat([torch.arange(end - count, end) for end, count in ends])
    nats, wrong = torch.zeros(len(asked), dtype=torch.float64), torch.zeros(len(asked), dtype=torch.int64)
    tokens = pad_sequence([torch.tensor(x) for x in inputs], batch_first=True).to(reader.device)  # [B, N]
    for part, logits in reader.chunks(tokens):
        here = ((position >= part.start) & (position < part.stop)).nonzero()[:, 0]
        if not len(here):
            continue
        places = (x.to(logits.device) for x in (row[here], position[here] - part.start))
        own, expected = logits[tuple(places)], label[here].to(logits.device)  # [K, V] and [K] of this chunk
        nats.index_add_(0, pair[here], -token_losses(own[None], expected[None])[0].cpu().double())
        wrong.index_add_(0, pair[here], (own.argmax(-1) != expected).cpu().long())
    return nats, wrong == 0


def _continued(
    reader: Reader, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], how: Continuing
) -> Iterator[str]:
    """Continuations of a batch of prompts; call it within `inferring`. It stops as soon as all texts have ended."""
    input_ids, padding = pad_prompts(prompts, reader.device)
    steps = stream_tokens(
        reader.model,
        input_ids,
        how.max_new_tokens,
        how.sampling,
        padding=padding,
        eos_token_id=how.end_tokens,
        full_cache=reader.full_cache,
        chunk_size=reader.chunk_size,
    )
    made: list[list[int]] = []  # tokens of all rows, for each step so far

    def tokens(row: int) -> Iterator[int]:
        for number in itertools.count():
            if number == len(made):
                step = next(steps, None)
                if step is None:
                    return
                made.append(step.tolist())
            if made[number][row] in how.end_tokens:
                return
            yield made[number][row]

    for row in range(len(prompts)):
        yield "".join(decode_until(tokenizer, tokens(row), how.stop))


def _batches(items: Sequence, size: int, what: str) -> Iterator[Sequence]:
    """Batches of items, with a progress bar if there are several."""
    with tqdm(total=len(items), desc=what, disable=len(items) <= size) as bar:
        for start in range(0, len(items), size):
            yield items[start : start + size]
            bar.update(min(size, len(items) - start))
