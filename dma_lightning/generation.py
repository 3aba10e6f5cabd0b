"""Generates tokens and text with a trained model, at a constant cost per token.

B batch, N prompt length, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dma_kernels.context import ContextGroup
from dma_lightning.data.base import Batch
from dma_lightning.mixers.base import MixerCache
from dma_lightning.reading_together import read_together
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import Tokenizer
from dma_lightning.vocabularies import check_tokens


class Decoder(Protocol):
    """A model that continues from a cache, such as `DogeForCausalLM`.

    If it has a `vocab_size`, prompts and end tokens are checked against it.
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
    context: ContextGroup | None = None,
) -> Iterator[Tensor]:
    """Continue sequences, token by token.

    Dropout and the like are off during generation. A prompt may be longer than `max_position_embeddings`. Iterate
    either entirely inside `torch.inference_mode` or entirely outside.

    Args:
        model: the decoder.
        input_ids: the prompts, int64 `[B, N]`, N >= 1.
        max_new_tokens: maximum number of tokens to generate.
        sampling: how tokens are chosen. Default: the likeliest.
        padding: bool `[B, N]`, True at the padded positions of shorter prompts, which are padded on the left.
        eos_token_id: token or tokens that end a sequence. An ended sequence repeats the first of them until all
            sequences have ended.
        seed: seed for drawing tokens. Default: draw with torch's global generator.
        full_cache: keep all keys, for comparison; the tokens are the same up to rounding.
        chunk_size: number of prompt positions to read at once, in one process.
        context: processes that read the prompts together, each one part at once; all call this with the same prompts.

    Yields:
        int64 `[B]`, the next token of each sequence; with `context`, only in its last process.

    Raises:
        ValueError: on a wrong shape or size, padding that is not on the left, tokens that the model does not know, or
            in the cases of `read_together`.
    """
    sampling = sampling or Sampling()
    _check_prompts(input_ids, padding, max_new_tokens, chunk_size)
    if context is not None and full_cache:
        raise ValueError("full_cache: expected False where processes read prompts together, got True")
    if max_new_tokens == 0:
        return
    end_tokens = _end_tokens(eos_token_id)
    _check_known(model, input_ids, end_tokens)
    eos = torch.tensor(end_tokens, dtype=torch.int64, device=input_ids.device)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    cache = model.new_cache(input_ids.shape[0], full_cache)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    with evaluating(model):
        logits = _read_prompts(model, input_ids, padding, cache, chunk_size, context)
        if context is not None and context.rank + 1 < context.size:
            return
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
    """All tokens of `stream_tokens`, int64 `[B, at most max_new_tokens]`; it also documents the options."""
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
    """Split a sequence of a batch into a prompt and what follows it in the data: int64 `[at most length]` and `[n]`.

    Both parts contain only the document of the prompt's last token, without padding.

    Args:
        batch: the batch.
        row: index of the sequence.
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
    """The text of tokens, and of more tokens that follow: one piece per token, and at the end any rest.

    All pieces together are the text of all tokens. A character that spans both parts goes to the second.
    """
    pieces = list(tokenizer.decode_stream([*tokens, *more]))
    first, second = pieces[: len(tokens)], pieces[len(tokens) :]
    *_, begun = tokenizer.decode_stream(tokens)  # the last token may hold whole characters and part of one
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
    """Continue a text; yields pieces of the continuation as they come.

    Args:
        model: the decoder.
        tokenizer: the model's tokenizer.
        prompt: text to continue, not empty.
        max_new_tokens: maximum number of tokens to generate.
        sampling: how tokens are chosen. Default: the likeliest.
        stop: strings that end the text; it stops before the first one.
        device: the model's device.
        options: further arguments of `stream_tokens`.

    Raises:
        ValueError: for an empty prompt or stop string, and in the cases of `stream_tokens`.
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
    """Stream the text of tokens that follow `after` up to the first stop string, without taking a token beyond it.

    Raises:
        ValueError: if `stop` is one string instead of a list, or a string in it is empty.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop: expected a list of strings, none of them empty, got {stop!r}")
    return _until(tokenizer.decode_stream(tokens, after), stop)


def _until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Text up to the first of the stop strings; text that may begin one is held back."""
    held, found = "", -1
    for piece in pieces:
        held += piece
        found = min((held.find(text) for text in stop if text in held), default=-1)
        begun = len(held) - max((_begun(held, text) for text in stop), default=0)
        if 0 <= found <= begun:  # else a stop string that begins earlier may still complete, and would be the first
            break
        if begun:
            yield held[:begun]
            held, found = held[begun:], max(found - begun, -1)
    if held := held[:found] if found >= 0 else held:
        yield held


def _begun(held: str, stop: str) -> int:
    """How many characters at the end of a text may be the start of a stop string."""
    longest = min(len(held), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if held.endswith(stop[:n])), 0)


def _read_prompts(
    model: Decoder,
    input_ids: Tensor,
    padding: Tensor | None,
    cache: Sequence[MixerCache],
    chunk_size: int,
    context: ContextGroup | None,
) -> Tensor:
    """Logits of the first new token, `[B, V]`; with `context`, only in its last process."""
    if context is not None:
        return read_together(model, input_ids, padding, cache, context)
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
        raise ValueError("padding: expected True only on the left of each row, and a real token at its end")


def _end_tokens(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The tokens that can end a text; negative ones cannot."""
    given = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    return [token for token in given if token >= 0]


def _check_known(model: Decoder, input_ids: Tensor, eos: Sequence[int]) -> None:
    """Check that the model knows these tokens, if it has a `vocab_size`.

    Raises:
        ValueError: if it does not know one.
    """
    vocab_size = getattr(model, "vocab_size", None)
    if vocab_size is None:
        return
    check_tokens("input_ids", input_ids, vocab_size)
    if max(eos, default=0) >= vocab_size:
        raise ValueError(
            f"eos_token_id: expected tokens below the model's vocab_size = {vocab_size}, got {max(eos)}; name one that "
            "the model knows, or -1 for none"
        )


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """A context in evaluation mode; the previous mode is restored at its end.

    Modules compiled in place run uncompiled. Otherwise, each length would be compiled again, and new hooks would be
    ignored.
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
