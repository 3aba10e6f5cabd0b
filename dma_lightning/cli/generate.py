"""`dma-lightning generate`: text from a checkpoint, as it is made."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dma_lightning.generation import decode_until, pad_prompts, stream_tokens
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import SpecialTokens
from dma_lightning.trained_models import load_with_tokenizer


def generate(
    ckpt_path: Path,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str = "",
    stops: list[str] | None = None,
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
        prompt: text to go on with.
        max_new_tokens: how many tokens to make.
        temperature: logits are divided by it before tokens are drawn; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens that together reach this probability.
        min_p: draw from the tokens that are at least this share as likely as the likeliest.
        repetition_penalty: above 1, makes tokens that occurred before less likely.
        stop: string before which the text ends, as it is; by default none.
        stops: more of them, as a YAML list such as '[".", "!"]'.
        eos_token_id: token with which the text ends; by default the model's, -1 for none.
        special_tokens: whether a special token of the tokenizer that the prompt spells becomes that token (parse), or
            stays text, as for prompts that somebody else has written.
        seed: of the tokens that are drawn.
        device: where to compute, such as cpu or cuda:1; by default the GPU if there is one.
        backend: attention backend, if not the checkpoint's.
        full_cache: keep all keys, for comparison; but for rounding, the text is the same.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    module, tokenizer = load_with_tokenizer(ckpt_path, device, backend, special_tokens)
    model = module.model
    prompt_tokens = tokenizer.encode(prompt)
    input_ids, _ = pad_prompts([prompt_tokens], device)
    made = 0

    def tokens() -> Iterator[int]:
        nonlocal made
        eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
        for token in stream_tokens(
            model, input_ids, max_new_tokens, sampling, eos_token_id=eos, seed=seed, full_cache=full_cache
        ):
            made += 1
            yield int(token.item())

    start = time.perf_counter()
    pieces = decode_until(tokenizer, tokens(), [stop] * bool(stop) + (stops or []), prompt_tokens)
    print(prompt + next(pieces, ""), end="", flush=True)  # errors come first
    for piece in pieces:
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    print(flush=True)
    print(f"{made} tokens in {seconds:.2f} s, {made / seconds:.0f} tokens/s", file=sys.stderr)
