"""`dma-lightning generate`: prints text from a checkpoint while generating it."""

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
    """Continue a text, and print it while generating. At the end, print the speed, prompts included, to stderr.

    Args:
        ckpt_path: a checkpoint. Its tokens are bytes, or come from a tokenizer in the checkpoint or beside it.
        prompt: text to continue, used as it is; may be given several times.
        prompt_file: a file to use instead of a prompt, or - for standard input. Its whole text is the prompt, including
            the last line break.
        num_samples: number of texts for each prompt, printed prompt by prompt. If there is more than one text in all, a
            title line precedes each.
        max_new_tokens: maximum number of new tokens in each text.
        temperature: logits are divided by it before sampling; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens.
        top_p: sample from the likeliest tokens that together reach this probability.
        min_p: sample from the tokens whose probability is at least this share of the likeliest token's.
        repetition_penalty: above 1, makes tokens that occurred before less likely.
        stop: a text ends before this string, used as it is; may be given several times.
        eos_token_id: a text ends with this token; -1 for none. Default: the model's.
        special_tokens: whether the name of a special token in the prompt becomes that token (parse) or stays text
            (text). Use text for prompts that somebody else wrote.
        seed: seed for sampling. The first sample of a prompt is the same as with --num_samples 1. The seeds of the
            others follow from this one and do not depend on the number of samples.
        device: where to compute, such as cpu or cuda:1. Default: the GPU if there is one.
        backend: attention backend. Default: the checkpoint's.
        full_cache: keep all keys, for comparison; apart from rounding, the text is the same.

    Raises:
        ValueError: if there is no prompt, or an option is out of range.
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
    """The prompts.

    Raises:
        ValueError: if neither or both of prompts and a file are given, the file cannot be read, or a prompt is empty.
    """
    if (prompts is None) == (file is None):
        given = "none of them" if file is None else "both"
        raise ValueError(f"expected --prompt or --prompt_file, got {given}; give one of them")
    found = prompts if file is None else [_read(file)]
    if not found or not all(found):
        raise ValueError(f"{'prompt' if file is None else f'prompt_file {file}'}: expected text, got none")
    return found


def _read(file: str) -> str:
    """Read a file or standard input, without a byte order mark.

    Raises:
        ValueError: if it cannot be read or is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if file == "-" else user_path(file).read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt_file: expected a file of UTF-8 text, or - for standard input: {error}") from error


def _seeds(seed: int, count: int) -> list[int]:
    """The seed, and further seeds that follow from it."""
    generator = torch.Generator().manual_seed(seed)
    return [seed, *(int(torch.randint(2**63 - 1, (), generator=generator)) for _ in range(count - 1))]
