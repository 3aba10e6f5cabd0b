"""Decoding token by token equals the full forward, sampling equals Hugging Face's, and text ends where it should."""

import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from decode_live_sets import different_live_sets, text_tokens
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dma_lightning import (
    ByteTokenizer,
    DogeForCausalLM,
    ModelConfig,
    Sampling,
    generate,
    pad_prompts,
    stream_text,
    stream_tokens,
)
from dma_lightning.generation import decode_until, prompt_and_rest


def make_model(**changed: object) -> DogeForCausalLM:
    """A small model whose ranks differ."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 2100}
    model = DogeForCausalLM(ModelConfig(**sizes | {"keep_window_size": 64} | changed))
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
        torch.nn.init.normal_(layer.self_attn.dt_proj.weight)
    return model.eval()


def decoded(model: DogeForCausalLM, tokens: Tensor, chunks: list[int], **options: Tensor) -> Tensor:
    """Logits of all positions from a cache, read in chunks and then token by token."""
    cache, logits, start = model.new_cache(tokens.shape[0]), [], 0
    for size in [*chunks, *[1] * (tokens.shape[1] - sum(chunks))]:
        part = slice(start, start + size)
        logits.append(model(tokens[:, part], cache=cache, **{name: x[:, part] for name, x in options.items()}))
        start += size
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_2000_steps_equal_the_full_forward() -> None:
    """With w = 64, so nearly all keys have been dropped."""
    model, tokens = make_model(), torch.randint(256, (1, 2000))
    torch.testing.assert_close(decoded(model, tokens, []), model(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("chunks", [[1], [37], [5, 101, 1, 77]])
def test_chunks_padding_and_documents_equal_the_full_forward(chunks: list[int], full: bool) -> None:
    model, tokens = make_model(keep_window_size=20, keep_last=3, sinks=2), torch.randint(256, (3, 250))
    padding = torch.arange(250) < torch.tensor([[0], [30], [110]])
    documents = torch.arange(250).expand(3, -1) // 120
    expected = model(tokens, documents, padding)
    found = decoded(model, tokens, chunks, documents=documents, padding=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompts_of_different_lengths_do_not_see_each_other() -> None:
    model = make_model(keep_window_size=16)
    prompts = [torch.randint(256, (n,)).tolist() for n in (3, 40, 17)]
    input_ids, padding = pad_prompts(prompts)
    together = generate(model, input_ids, 30, padding=padding)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, model.generate(torch.tensor([prompt]), 30)[0])


@torch.no_grad()
def test_the_small_cache_makes_the_text_of_the_full_one() -> None:
    model, prompt = make_model(), torch.randint(256, (2, 300))
    tokens = model.generate(prompt, 100)
    assert torch.equal(tokens, model.generate(prompt, 100, full_cache=True))
    assert torch.equal(tokens, model.generate(prompt, 100, chunk_size=77))
    sequence = prompt
    for _ in range(20):  # and of no cache at all
        sequence = torch.cat([sequence, model(sequence)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens[:, :20], sequence[:, 300:])


def test_a_prompt_may_be_longer_than_the_training_length() -> None:
    model = make_model(max_position_embeddings=32, rope_scaling=4.0)
    assert model.generate(torch.randint(256, (1, 100)), 5).shape == (1, 5)


def test_generation_leaves_the_model_as_it_was() -> None:
    model = make_model(hidden_dropout=0.5).train()
    model.layers[0].eval()
    prompt = torch.randint(256, (1, 9))
    tokens = model.generate(prompt, 20)
    assert model.training
    assert not model.layers[0].training
    assert torch.equal(tokens, model.eval().generate(prompt, 20))  # no dropout meanwhile
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_k=500),
        Sampling(temperature=0.8, top_p=0.6),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(1.3, 0.9, 20, 0.9, 0.05),
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(sampling: Sampling) -> None:
    logits, tokens = 3 * torch.randn(8, 50), torch.randint(50, (8, 12))
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        processors.append(MinPLogitsWarper(sampling.min_p))
    occurred = torch.zeros(8, 50, dtype=torch.bool).scatter_(1, tokens, True)
    expected = processors(tokens, logits.clone())
    torch.testing.assert_close(sampling.filtered(logits, occurred).softmax(-1), expected.softmax(-1))


def test_tokens_are_drawn_in_proportion() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, -1)
    drawn = Sampling(temperature=1.0).choose(logits, torch.zeros(20_000, 4, dtype=torch.bool))
    share = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=5 * 0.5 / 20_000**0.5)


def test_a_seed_makes_the_same_text() -> None:
    model, prompt = make_model(), torch.randint(256, (2, 9))
    draw = [model.generate(prompt, 30, Sampling(temperature=1.0), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_repetition_penalty_counts_prompt_and_new_tokens_but_no_padding() -> None:
    """A penalty without end allows each token once."""
    model = make_model()
    input_ids, padding = pad_prompts([[5, 6, 7], [9]])
    tokens = model.generate(input_ids, 40, Sampling(repetition_penalty=1e30), padding=padding)
    for row, prompt in zip(tokens.tolist(), ([5, 6, 7], [9]), strict=True):
        assert len(set(row) | set(prompt)) == len(row) + len(prompt)


def test_sequences_end_with_eos() -> None:
    model, prompt = make_model(), torch.randint(256, (2, 9))
    free = model.generate(prompt, 50, Sampling(temperature=1.0), seed=3)
    eos = free[0, 10].item()
    tokens = model.generate(prompt, 50, Sampling(temperature=1.0), seed=3, eos_token_id=eos)
    ends = [(row == eos).nonzero()[0].item() if (row == eos).any() else 50 for row in free]
    assert tokens.shape[1] == min(max(ends) + 1, 50)
    for row, expected, end in zip(tokens, free, ends, strict=True):
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end:] == eos).all()


def test_a_model_ends_with_its_own_eos_tokens() -> None:
    model = make_model()
    free = model.generate(torch.arange(9)[None], 50, Sampling(temperature=1.0), seed=3)[0].tolist()
    eos = [free[20], free[10]]
    model.config = replace(model.config, eos_token_id=eos)
    tokens = model.generate(torch.arange(9)[None], 50, Sampling(temperature=1.0), seed=3)[0].tolist()
    assert tokens == free[: min(free.index(token) for token in eos) + 1]
    assert len(model.generate(torch.arange(9)[None], 50, eos_token_id=None)[0]) == 50


def test_guessed_tokens_are_verified_through_the_whole_model() -> None:
    """Of four guesses the first few are right; the text is that of one token at a time."""
    model = make_model()
    prompt = torch.randint(256, (1, 30))
    expected = model.generate(prompt, 40)[0].tolist()
    cache, text = model.new_cache(1), []
    with torch.no_grad():
        token = model(prompt, cache=cache, last_only=True)[0, -1].argmax().item()
        while len(text) < 36:
            right = len(text) % 4  # of the three guesses behind the token that is known
            guess = [token, *expected[len(text) + 1 : len(text) + 1 + right], *[0, 0, 0][right:]]
            chosen = model(torch.tensor([guess]), cache=[layer.guessing() for layer in cache])[0].argmax(-1).tolist()
            accepted = 1
            while accepted < 4 and guess[accepted] == chosen[accepted - 1]:
                accepted += 1
            assert accepted > right
            for layer in cache:
                layer.commit(torch.tensor([accepted]))
            text += guess[:accepted]
            token = chosen[accepted - 1]
    assert text == expected[: len(text)]


@pytest.mark.parametrize("pieces", [["xabcx"], list("xabcx"), ["xa", "bcx"], ["xab", "cx"]])
def test_of_stop_strings_that_overlap_the_first_to_begin_ends_the_text(pieces: list[str]) -> None:
    tokenizer = SimpleNamespace(decode_stream=lambda *_: iter(pieces))
    assert "".join(decode_until(tokenizer, [], ["abc", "b"])) == "x"
    assert "".join(decode_until(tokenizer, [], ["abd", "c"])) == "xab"
    assert "".join(decode_until(tokenizer, [], ["bcxy", "x"])) == ""
    assert "".join(decode_until(tokenizer, [], ["abcxy", "bcx"])) == "xa"


def test_text_ends_where_the_leftmost_stop_string_begins_however_it_is_cut() -> None:
    """And as soon as that is certain: no stop string that began before it may still be completed."""
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices("abc", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("abc", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))]
        cuts = sorted({0, len(text), *draw.choices(range(len(text) + 1), k=draw.randint(0, 12))})
        pieces, taken = [text[a:b] for a, b in pairwise(cuts)], []
        tokenizer = SimpleNamespace(decode_stream=lambda *_: (taken.append(x) or x for x in pieces))  # noqa: B023
        found = "".join(decode_until(tokenizer, [], stops))
        first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        assert found == text[:first], (text, pieces, stops)
        certain = (n for n in range(1, len(pieces) + 1) if ends("".join(pieces[:n]), stops))
        assert len(taken) == next(certain, len(pieces)), (text, pieces, stops)


def ends(text: str, stops: list[str]) -> bool:
    """Whether a stop string is certain to end a text, whatever comes next."""
    found = min((text.find(stop) for stop in stops if stop in text), default=-1)
    return found >= 0 and not any(stop.startswith(text[i:]) for stop in stops for i in range(found))


def test_a_long_stop_string_costs_little() -> None:
    """What is compared with it at each token is what is held back, and not all of its beginnings."""
    compared = 0

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, part: slice) -> str:
            nonlocal compared
            compared += 1
            return super().__getitem__(part)

    tokenizer = SimpleNamespace(decode_stream=lambda *_: iter(["xy "] * 50))
    assert "".join(decode_until(tokenizer, [], [Counted("a" * 1000)])) == "xy " * 50
    assert compared <= 50 * 3


@pytest.mark.parametrize(
    ("stop", "expected"),
    [([], "ab ENDc é"), (["END"], "ab "), (["ENDx"], "ab ENDc é"), (["é", "c "], "ab END"), (["zz", "b E"], "a")],
)
def test_text_ends_before_a_stop_string(stop: list[str], expected: str) -> None:
    taken = []

    def tokens():
        for token in "ab ENDc é".encode():
            taken.append(token)
            yield token

    assert "".join(decode_until(ByteTokenizer(), tokens(), stop)) == expected
    if stop == ["END"]:
        assert bytes(taken) == b"ab END"  # no token is made in vain


def test_bytes_become_text_as_soon_as_a_character_is_whole() -> None:
    tokenizer = ByteTokenizer()
    text = "aé𝄞z"
    assert list(tokenizer.decode_stream(tokenizer.encode(text))) == ["a", "", "é", "", "", "", "𝄞", "z", ""]
    assert "".join(tokenizer.decode_stream([0xC3, 65, 300, 0xF0])) == "\ufffdA\ufffd\ufffd"


def test_autocast_generates_in_its_dtype() -> None:
    model, prompt = make_model(), torch.randint(256, (1, 90))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.new_cache(1)[0].state.key.dtype == torch.bfloat16
        tokens = model.generate(prompt, 10)
    assert tokens.shape == model.bfloat16().generate(prompt, 10).shape == (1, 10)


def test_text_streams() -> None:
    model = make_model()
    pieces = list(stream_text(model, ByteTokenizer(), "abc", 30, Sampling(temperature=1.0), seed=0))
    tokens = model.generate(torch.tensor([[97, 98, 99]]), 30, Sampling(temperature=1.0), seed=0)[0]
    assert "".join(pieces) == bytes(tokens.tolist()).decode(errors="replace")
    assert len(pieces) > 1


def test_bad_input() -> None:
    model, ids = make_model(), torch.randint(256, (2, 5))
    for sampling, message in (
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty > 0"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 1.5}, "top_p: expected 0 < top_p <= 1, got 1.5"),
        ({"min_p": 0.0}, "min_p"),
        ({"top_k": 5, "min_p": 0.1}, "temperature: expected more than 0 with top_k and min_p, got 0, which always"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**sampling)
    with pytest.raises(ValueError, match=r"input_ids: expected \[B >= 1, N >= 1\], got \[2, 0\]"):
        model.generate(ids[:, :0], 3)
    with pytest.raises(ValueError, match="max_new_tokens >= 0"):
        model.generate(ids, -1)
    with pytest.raises(ValueError, match="padding: expected True only on the left"):
        model.generate(ids, 3, padding=torch.tensor([[False] * 4 + [True], [False] * 5]))
    with pytest.raises(ValueError, match="padding: expected bool"):
        model.generate(ids, 3, padding=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="each with a token"):
        pad_prompts([[1], []])
    with pytest.raises(ValueError, match="prompt: expected text"):
        next(stream_text(model, ByteTokenizer(), "", 3))
    for stop in ([""], "END"):
        with pytest.raises(ValueError, match="stop: expected a list of strings"):
            decode_until(ByteTokenizer(), [], stop)
    for cache in ([], model.new_cache(2)[:1]):
        with pytest.raises(ValueError, match="cache: expected one for each of the 2 layers"):
            model(ids, cache=cache)
    assert model.generate(ids, 0).shape == (2, 0)
    assert len(list(stream_tokens(model, ids, 4))) == 4


def test_live_sets_of_real_text_are_those_of_the_full_forward() -> None:
    """Every byte that returns ties with itself in the first layer."""
    model = make_model(keep_window_size=30, max_position_embeddings=600)
    different, queries = different_live_sets(model, text_tokens(600))
    assert queries.tolist() == [2 * 600] * 2
    assert different.tolist() == [0, 0]


def test_prompts_stay_within_a_document() -> None:
    tokens = torch.arange(20).view(2, 10)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [0] * 10])
    padding = torch.tensor([[False] * 10, [False] * 6 + [True] * 4])
    batch = {"input_ids": tokens, "labels": tokens, "documents": documents, "padding": padding}
    halves = [[part.tolist() for part in prompt_and_rest(batch, row)] for row in range(2)]
    assert halves == [[[3, 4], [5, 6]], [[10, 11, 12], [13, 14, 15]]]
    assert [part.tolist() for part in prompt_and_rest(batch, 0, 8)] == [[7], [8, 9]]
    assert [part.tolist() for part in prompt_and_rest(batch, 1, 8)] == [[10, 11, 12, 13, 14, 15], []]
