"""Tokens and text out of a trained model, at a constant cost per token.

B batch, N prompt length, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dma_lightning.data.base import Batch
from dma_lightning.mixers.base import MixerCache
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import Tokenizer
from dma_lightning.vocabularies import check_tokens


class Decoder(Protocol):
    """A model that reads on from a cache, such as `DogeForCausalLM`.

    If it has a `vocab_size`, prompts and end tokens are compared with it.
    """

    def new_cache(self, batch: int, full: bool = False) -> list[MixerCache]:
        """Empty caches of all layers."""

    def __call__(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        cache: Sequence[MixerCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits."""


@torch.no_grad()
def stream_tokens(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    padding: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | None = None,
    full_cache: bool = False,
    chunk_size: int = 8192,
) -> Iterator[Tensor]:
    """Go on with sequences, token by token.

    Dropout and the like are off while tokens are made. A prompt may be longer than `max_position_embeddings`. Take all
    tokens within `torch.inference_mode`, or none.

    Args:
        model: the decoder.
        input_ids: the prompts, int64 `[B, N]`, N >= 1.
        max_new_tokens: when to stop.
        sampling: how tokens are chosen; by default the likeliest.
        padding: bool `[B, N]`, True at the padded positions of shorter prompts, which are padded on the left.
        eos_token_id: a sequence ends with it, or with one of several, and goes on as the first until all have ended.
        seed: of the tokens that are drawn; by default torch's global generator draws.
        full_cache: keep all keys, for comparison; but for rounding, the tokens are the same.
        chunk_size: the prompt is read in pieces of so many positions.

    Yields:
        int64 `[B]`, the next token of each sequence.

    Raises:
        ValueError: on a wrong shape or size, padding that is not on the left, or tokens that the model does not know.
    """
    sampling = sampling or Sampling()
    _check_prompts(input_ids, padding, max_new_tokens, chunk_size)
    if max_new_tokens == 0:
        return
    end_tokens = _end_tokens(eos_token_id)
    _check_known(model, input_ids, end_tokens)
    eos = torch.tensor(end_tokens, dtype=torch.int64, device=input_ids.device)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    cache = model.new_cache(input_ids.shape[0], full_cache)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    with evaluating(model):
        logits = _read_prompts(model, input_ids, padding, cache, chunk_size)
        real = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else ~padding
        occurred = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
        occurred = occurred.scatter_add_(1, input_ids.long(), real.int()) > 0
    for i in range(max_new_tokens):
        token = sampling.choose(logits, occurred, generator)
        if len(eos):
            token = torch.where(ended, eos[0], token)
            ended = ended | torch.isin(token, eos)
        occurred.scatter_(1, token[:, None], True)
        yield token
        if i + 1 == max_new_tokens or (len(eos) and bool(ended.all())):
            return
        with evaluating(model):
            logits = model(token[:, None], cache=cache, last_only=True)[:, -1]


def generate(
    model: Decoder, input_ids: Tensor, max_new_tokens: int, sampling: Sampling | None = None, **options: Any
) -> Tensor:
    """All tokens of `stream_tokens`, which takes the options, int64 `[B, at most max_new_tokens]`."""
    tokens = list(stream_tokens(model, input_ids, max_new_tokens, sampling, **options))
    return torch.stack(tokens, dim=1) if tokens else input_ids.new_empty(input_ids.shape[0], 0)


def pad_prompts(prompts: Sequence[Sequence[int]], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths side by side, padded on the left: int64 and bool `[B, N]`.

    Raises:
        ValueError: without prompts, or if one is empty.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"prompts: expected at least one, each with a token, got lengths {[len(x) for x in prompts]}")
    rows = [torch.tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    real = [torch.zeros_like(row, dtype=torch.bool) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_side="left")
    return input_ids, pad_sequence(real, batch_first=True, padding_value=True, padding_side="left")


def prompt_and_rest(batch: Batch, row: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """A sequence of a batch as a prompt and what follows it in the data: int64 `[at most length]` and `[n]`.

    Both are of one document, that of the prompt's last token, and without padding.

    Args:
        batch: of sequences.
        row: which of them.
        length: tokens of the sequence up to the prompt's end. Default: half of them.
    """
    real = torch.ones_like(batch["input_ids"][row], dtype=torch.bool)
    real = ~batch["padding"][row] if "padding" in batch else real
    tokens = batch["input_ids"][row][real]
    documents = batch["documents"][row][real] if "documents" in batch else torch.zeros_like(tokens)
    end = min(length or max(1, len(tokens) // 2), len(tokens))
    same = documents == documents[end - 1]
    return tokens[:end][same[:end]], tokens[end:][same[end:]]


def split_text(tokenizer: Tokenizer, tokens: Sequence[int], more: Sequence[int]) -> tuple[list[str], list[str]]:
    """The text of tokens and of more tokens behind them, in a piece for each token and what is left over.

    All pieces together are the text of all tokens. A character that the border cuts stands in the second part.
    """
    pieces = list(tokenizer.decode_stream([*tokens, *more]))
    first, second = pieces[: len(tokens)], pieces[len(tokens) :]
    *_, begun = tokenizer.decode_stream(tokens)  # a last token may hold whole characters and a part of one
    whole, place = begun.rstrip("\ufffd"), next((i for i, piece in enumerate(second) if piece), 0)
    if whole and second[place].startswith(whole):
        first[-1] += whole
        second[place] = second[place].removeprefix(whole)
    return first, second


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    device: torch.device | str | None = None,
    **options: Any,
) -> Iterator[str]:
    """Go on with a text; pieces of it as they come.

    Args:
        model: the decoder.
        tokenizer: of the model.
        prompt: text to go on with, not empty.
        max_new_tokens: when to stop.
        sampling: how tokens are chosen; by default the likeliest.
        stop: strings before which the text ends.
        device: where the model is.
        options: further arguments of `stream_tokens`.

    Raises:
        ValueError: for an empty prompt or stop string, and as `stream_tokens`.
    """
    if not prompt:
        raise ValueError("prompt: expected text, got an empty string")
    prompt_tokens = tokenizer.encode(prompt)
    input_ids, _ = pad_prompts([prompt_tokens], device)
    tokens = (int(token.item()) for token in stream_tokens(model, input_ids, max_new_tokens, sampling, **options))
    yield from decode_until(tokenizer, tokens, stop, prompt_tokens)


def decode_until(
    tokenizer: Tokenizer, tokens: Iterable[int], stop: Sequence[str] = (), after: Sequence[int] = ()
) -> Iterator[str]:
    """Text of tokens as they come `after` others, up to the first of the stop strings; no token beyond it is taken.

    Raises:
        ValueError: if `stop` is a string instead of several, or one is empty.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop: expected a list of strings, none of them empty, got {stop!r}")
    return _until(tokenizer.decode_stream(tokens, after), stop)


def _until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Text up to the first of the stop strings; what may be the beginning of one is held back."""
    held, found = "", -1
    for piece in pieces:
        held += piece
        found = min((held.find(text) for text in stop if text in held), default=-1)
        begun = len(held) - max((_begun(held, text) for text in stop), default=0)
        if 0 <= found <= begun:  # else one that has begun before may be the first, if it goes on
            break
        if begun:
            yield held[:begun]
            held, found = held[begun:], max(found - begun, -1)
    if held := held[:found] if found >= 0 else held:
        yield held


def _begun(held: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(held), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if held.endswith(stop[:n])), 0)


def _read_prompts(
    model: Decoder, input_ids: Tensor, padding: Tensor | None, cache: Sequence[MixerCache], chunk_size: int
) -> Tensor:
    """Logits of the first new token, `[B, V]`."""
    for start in range(0, input_ids.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        padded = None if padding is None else padding[:, part]
        logits = model(input_ids[:, part], padding=padded, cache=cache, last_only=True)
    return logits[:, -1]


def _check_prompts(input_ids: Tensor, padding: Tensor | None, max_new_tokens: int, chunk_size: int) -> None:
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids: expected [B >= 1, N >= 1], got {list(input_ids.shape)}")
    if max_new_tokens < 0 or chunk_size < 1:
        raise ValueError(f"expected max_new_tokens >= 0 and chunk_size >= 1, got {max_new_tokens} and {chunk_size}")
    if padding is None:
        return
    if padding.shape != input_ids.shape or padding.dtype != torch.bool:
        raise ValueError(f"padding: expected bool {list(input_ids.shape)}, got {padding.dtype} {list(padding.shape)}")
    if padding[:, -1].any() or (padding[:, 1:] & ~padding[:, :-1]).any():
        raise ValueError("padding: expected True on the left of each row alone, and a real token at its end")


def _end_tokens(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Those that a text can end with; none is negative."""
    given = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    return [token for token in given if token >= 0]


def _check_known(model: Decoder, input_ids: Tensor, eos: Sequence[int]) -> None:
    """That a model that says which tokens it knows knows these.

    Raises:
        ValueError: if it does not.
    """
    vocab_size = getattr(model, "vocab_size", None)
    if vocab_size is None:
        return
    check_tokens("input_ids", input_ids, vocab_size)
    if max(eos, default=0) >= vocab_size:
        raise ValueError(
            f"eos_token_id: expected tokens below the model's vocab_size = {vocab_size}, got {max(eos)}; name one that "
            "the model can say, or -1 for none"
        )


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Evaluation mode within, the mode before without.

    Modules that were compiled in place run as written: each length would be compiled anew, and new hooks not be seen.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    compiled = {module: module._compiled_call_impl for module in modules if module._compiled_call_impl}
    for module in training:
        module.training = False
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, call in compiled.items():
            module._compiled_call_impl = call
