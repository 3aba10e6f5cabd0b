"""`dma-lightning generate`: text from a checkpoint, as it is made."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dma_lightning.data.find_files import user_path
from dma_lightning.generation import decode_until, pad_prompts, stream_tokens
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import SpecialTokens
from dma_lightning.trained_models import load_with_tokenizer


def generate(
    ckpt_path: Path,
    prompt: list[str] | None = None,
    prompt_file: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    eos_token_id: int | None = None,
    special_tokens: SpecialTokens = "parse",
    seed: int = 0,
    device: str | None = None,
    backend: str | None = None,
    full_cache: bool = False,
) -> None:
    """Go on with a text, and print it as it is made; at the end, on stderr, how fast that was, prompt included.

    Args:
        ckpt_path: a checkpoint; its tokens are bytes, or those of the tokenizer in it or beside it.
        prompt: text to go on with, as it is; may be given several times.
        prompt_file: instead of a prompt, a file whose whole text is one, its last line break included; - for standard
            input.
        num_samples: how many texts to make of each prompt. They are printed prompt by prompt; if there are several in
            all, a line before each says which it is.
        max_new_tokens: how many tokens to make at most for each text.
        temperature: logits are divided by it before tokens are drawn; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens that together reach this probability.
        min_p: draw from the tokens that are at least this share as likely as the likeliest.
        repetition_penalty: above 1, makes tokens that occurred before less likely.
        stop: string before which a text ends, as it is; may be given several times.
        eos_token_id: token with which a text ends; by default the model's, -1 for none.
        special_tokens: whether a special token of the tokenizer that the prompt spells becomes that token (parse), or
            stays text, as for prompts that somebody else has written.
        seed: of the tokens that are drawn. The first sample of a prompt is that of --num_samples 1; the seeds of the
            others follow from this one, and do not depend on how many there are.
        device: where to compute, such as cpu or cuda:1; by default the GPU if there is one.
        backend: attention backend, if not the checkpoint's.
        full_cache: keep all keys, for comparison; but for rounding, the text is the same.

    Raises:
        ValueError: unless there is a prompt, or a file of one; on options out of range.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    prompts, seeds = _prompts(prompt, prompt_file), _seeds(seed, num_samples)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    module, tokenizer = load_with_tokenizer(ckpt_path, device, backend, special_tokens)
    model, made = module.model, 0
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id

    def tokens(prompt_tokens: Sequence[int], sample_seed: int) -> Iterator[int]:
        nonlocal made
        input_ids, _ = pad_prompts([prompt_tokens], device)
        for token in stream_tokens(
            model, input_ids, max_new_tokens, sampling, eos_token_id=eos, seed=sample_seed, full_cache=full_cache
        ):
            made += 1
            yield int(token.item())

    start = time.perf_counter()
    for (i, text), (k, sample_seed) in itertools.product(enumerate(prompts, 1), enumerate(seeds, 1)):
        encoded = tokenizer.encode(text)
        pieces = decode_until(tokenizer, tokens(encoded, sample_seed), stop or [], encoded)
        title = f"--- prompt {i} of {len(prompts)}, sample {k} of {num_samples} ---\n"
        _print_text(title if len(prompts) * num_samples > 1 else "", text, pieces)
    seconds = time.perf_counter() - start
    print(f"{made} tokens in {seconds:.2f} s, {made / seconds:.0f} tokens/s", file=sys.stderr)


def _print_text(title: str, prompt: str, pieces: Iterator[str]) -> None:
    print(title + prompt + next(pieces, ""), end="", flush=True)  # errors come first
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _prompts(prompts: list[str] | None, file: str | None) -> list[str]:
    """What to go on with.

    Raises:
        ValueError: unless prompts or a file are given, on a file that cannot be read, and on an empty prompt.
    """
    if (prompts is None) == (file is None):
        given = "none of them" if file is None else "both"
        raise ValueError(f"expected --prompt or --prompt_file, got {given}; give one of the two")
    found = prompts if file is None else [_read(file)]
    if not found or not all(found):
        raise ValueError(f"{'prompt' if file is None else f'prompt_file {file}'}: expected text, got none")
    return found


def _read(file: str) -> str:
    """The text of a file or of standard input, without a byte order mark.

    Raises:
        ValueError: if it cannot be read, or is no UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if file == "-" else user_path(file).read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt_file: expected a file of UTF-8 text, or - for standard input: {error}") from error


def _seeds(seed: int, count: int) -> list[int]:
    """The seed and others that follow from it."""
    generator = torch.Generator().manual_seed(seed)
    return [seed, *(int(torch.randint(2**63 - 1, (), generator=generator)) for _ in range(count - 1))]
