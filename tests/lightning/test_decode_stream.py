"""Streamed text equals the text of all tokens, with the library's decoder where it can stream, else with our own."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from dma_lightning.callbacks import ContinuationWriter
from dma_lightning.generation import split_text
from dma_lightning.monitoring import SampleMonitor
from dma_lightning.tokenizers import ByteTokenizer, FileTokenizer

CORPUS = ["Größe 𝄞, and words – “quoted” don't . ! 日本語\n", "the cat sat  on naïve mats", "a b c d\t\n  x"]
SPECIAL = ["<unk>", "<s>"]


def trained(model: models.Model, trainer: type, **parts: object) -> Tokenizer:
    """A small tokenizer trained on the corpus."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if "byte" in repr(parts).lower() else {}
    tokenizer.train_from_iterator(
        CORPUS, trainer(vocab_size=320, special_tokens=SPECIAL, show_progress=False, **options)
    )
    return tokenizer


def byte_level() -> Tokenizer:
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    tokenizer = trained(models.BPE(), trainers.BpeTrainer, **parts)
    tokenizer.add_tokens(["ADDED", " “a"])
    return tokenizer


def metaspace() -> Tokenizer:
    parts = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    return trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, **parts)


def word_piece() -> Tokenizer:
    parts = {"normalizer": normalizers.NFC(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    parts["decoder"] = decoders.WordPiece()
    return trained(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, **parts)


def byte_fallback() -> Tokenizer:
    """A tokenizer with byte fallback, like Llama's first ones."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "日", "▁a", "▁▁"]
    merges = [("▁", "a"), ("▁", "▁")]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces[0], decoders.ByteFallback(), decoders.Fuse(), spaces[1]])
    return tokenizer


TOKENIZERS = {
    x.__name__: FileTokenizer.of_json(x().to_str()) for x in (byte_level, metaspace, word_piece, byte_fallback)
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def streams(tokenizer: FileTokenizer, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Earlier tokens, and tokens to decode: text, arbitrary ids (even unknown ones), and long runs of a few tokens."""
    chance = random.Random(0)
    for _ in range(count):
        text = "".join(chance.choices("aé日𝄞 b–“”.,'nt!\n", k=chance.randint(1, 40)))
        ids = [chance.randrange(tokenizer.vocab_size + 3) for _ in range(chance.randint(1, 150))]
        runs = [token for token in ids[:5] for _ in range(chance.randint(1, 80))]
        tokens = chance.choice([tokenizer.encode(text), ids, runs])
        cut = chance.choice([0, chance.randint(0, len(tokens))])
        yield tokens[:cut], tokens[cut:]


class NoDecodeStream:
    """A decoder of the library that can never stream."""

    def __init__(self, skip_special_tokens: bool) -> None:
        assert skip_special_tokens

    def step(self, *_: object) -> None:
        raise ValueError("Invalid prefix")


@every_tokenizer
def test_both_decoders_give_the_same_pieces(tokenizer: FileTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(streams(tokenizer, 150))
    found = [list(tokenizer.decode_stream(tokens, after)) for after, tokens in cases]
    monkeypatch.setattr("dma_lightning.tokenizers.DecodeStream", NoDecodeStream)
    for (after, tokens), pieces in zip(cases, found, strict=True):
        assert len(pieces) == len(tokens) + 1
        assert pieces == list(tokenizer.decode_stream(tokens, after)), (after, tokens)


@every_tokenizer
def test_text_is_that_of_the_whole(tokenizer: FileTokenizer) -> None:
    """Also behind a long run of special tokens, which are not shown."""
    text = tokenizer.encode("a cat sat – “on” naïve mats, 日本")
    for tokens in (text, text + [1] * 40 + text, [1] * 70 + text):
        assert "".join(tokenizer.decode_stream(tokens)) == tokenizer.tokenizer.decode(tokens)


def test_bytes_that_change_the_text_before_them_lose_none_of_it() -> None:
    """By themselves and with others, bytes of no character decode to different text; the library's decoder gives up."""
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer.tokenizer.token_to_id(x) for x in ("a", "<0xC3>", "<0xA9>", "<0xE2>", "b", "▁a", "日")]
    stream = DecodeStream(skip_special_tokens=True)
    assert [stream.step(tokenizer.tokenizer, token) for token in ids[:4]] == ["a", None, "é", None]
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(tokenizer.tokenizer, ids[4])
    assert list(tokenizer.decode_stream(ids)) == ["a", "", "é", "", "\ufffd\ufffdb", " a", "日", ""]


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values(), ByteTokenizer()], ids=[*TOKENIZERS, "bytes"])
def test_a_text_in_two_parts_is_the_text(tokenizer: FileTokenizer | ByteTokenizer) -> None:
    for first, second in streams(tokenizer, 150):
        before, behind = split_text(tokenizer, first, second)
        assert (len(before), len(behind)) == (len(first), len(second) + 1)
        assert "".join(before + behind) == "".join(tokenizer.decode_stream(first + second))
        assert split_text(tokenizer, first, [1, 2])[0] == before


def test_a_character_that_the_border_cuts_stands_once_in_the_second_part() -> None:
    tokens = list("aé".encode())
    assert split_text(ByteTokenizer(), tokens[:2], tokens[2:]) == (["a", ""], ["é", ""])
    assert split_text(ByteTokenizer(), tokens[:2], []) == (["a", ""], ["\ufffd"])
    assert split_text(ByteTokenizer(), [], tokens[:1]) == ([], ["a", ""])
    # A token that ends with a part of a character holds the space before it, too.
    vocabulary = {"Ġâ": 0, "Ģ": 1, "ľ": 2, "x": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert split_text(FileTokenizer.of_json(tokenizer.to_str()), [3, 0], [1, 2, 3]) == (["x", " "], ["", "“", "x", ""])


def test_prompt_and_continuation_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what `predict` writes and in what TensorBoard shows."""
    tokenizer = TOKENIZERS["metaspace"]
    ids = torch.tensor([tokenizer.encode("the cat sat on the mats the cat")[:8]])
    monkeypatch.setattr("dma_lightning.callbacks.continuations.generate", lambda *_, **__: ids[:, 4:])
    monkeypatch.setattr("dma_lightning.monitoring.samples.generate", lambda *_, **__: ids[:, 4:])
    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(forward_context=torch.no_grad),
        datamodule=SimpleNamespace(tokenizer=tokenizer),
    )
    module = SimpleNamespace(device="cpu", model=None)
    writer = ContinuationWriter()
    writer.file = tmp_path / "lines.jsonl"
    writer.write_on_batch_end(trainer, module, None, None, {"input_ids": ids}, 0, 0)
    line = json.loads(writer.file.read_text())
    text = tokenizer.tokenizer.decode(ids[0].tolist())
    assert line["prompt"] + line["continuation"] == line["prompt"] + line["expected"] == text
    assert line["expected"].startswith(" ")

    shown = []
    board = SimpleNamespace(add_text=lambda name, text, step: shown.append(text))
    SampleMonitor()._show_continuation([board], 0, module, {"input_ids": ids}, tokenizer)
    assert shown == [
        f"<pre>{line['prompt']}<strong>{line['expected']}</strong></pre>\n\nThe data continues:\n\n"
        f"<pre>{line['expected']}</pre>"
    ]
