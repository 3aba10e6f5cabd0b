"""The loss by position: whole documents, buckets that add up, and correct counts of bytes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import ATTENTIONS, make_model

from dma_lightning import ByteTokenizer, FileTokenizer
from dma_lightning.cli.train_tokenizer import train_tokenizer
from dma_lightning.evaluation import Reader, position_buckets
from dma_lightning.evaluation.positions import Beginning, long_documents
from dma_lightning.evaluation.scores import Scores


def drawn(count: int, length: int) -> list[Beginning]:
    """Documents of random bytes. Some of the bytes stand for nothing."""
    random = np.random.RandomState(0)
    shape = (count, length + 1)
    rows = zip(random.randint(256, size=shape), random.randint(3, size=shape), strict=True)
    return [Beginning(tokens, sizes) for tokens, sizes in rows]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_buckets_add_up_to_one_forward_pass(attention: str) -> None:
    model, documents = make_model(attention, vocab_size=256), drawn(5, 200)
    tokens = torch.from_numpy(np.stack([document.tokens for document in documents]))
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    for chunk, batch_size in ((200, 5), (33, 2), (1, 100)):
        buckets = position_buckets(Reader(model, chunk_size=chunk), documents, batch_size)
        assert [(bucket.first, bucket.last) for bucket in buckets] == [(0, 63), (64, 127), (128, 199)]
        for bucket in buckets:
            part = slice(bucket.first, bucket.last + 1)
            scores = Scores.of(logits[:, part], tokens[:, 1:][:, part])
            own = (scores.nats / scores.labels).numpy()
            assert bucket.loss == pytest.approx(scores.loss, rel=1e-10)
            assert bucket.standard_error == pytest.approx(own.std(ddof=1) / math.sqrt(5), rel=1e-9)
            size = sum(document.bytes[1:][part].sum() for document in documents)
            assert bucket.bits_per_byte == pytest.approx(scores.nats.sum().item() / size / math.log(2), rel=1e-10)
            assert bucket.documents == 5
        total = sum(bucket.loss * (bucket.last + 1 - bucket.first) for bucket in buckets) / 200
        assert total == pytest.approx(Scores.of(logits, tokens[:, 1:]).loss, rel=1e-10)


@pytest.mark.parametrize(("length", "ends"), [(1, [0]), (63, [62]), (64, [63]), (65, [63, 64]), (128, [63, 127])])
def test_the_last_bucket_ends_with_the_documents(length: int, ends: list[int]) -> None:
    buckets = position_buckets(Reader(make_model("dma", vocab_size=256)), drawn(1, length), 8)
    assert [bucket.last for bucket in buckets] == ends
    assert all(bucket.standard_error is None for bucket in buckets)


def test_long_documents_are_found_in_files(tmp_path: Path) -> None:
    texts = ["a" * 30, "b" * 31, "ü" * 20, "c"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("d" * 3_000_000)
    files = sorted(tmp_path.iterdir())
    found = long_documents(files, ByteTokenizer(), 30, 10, "body")
    assert [bytes(document.tokens.tolist()) for document in found] == [b"b" * 31, ("ü" * 20).encode()[:31], b"d" * 31]
    assert all((document.bytes == 1).all() and len(document.bytes) == 31 for document in found)
    assert len(long_documents(files, ByteTokenizer(), 30, 2, "body")) == 2
    with pytest.raises(ValueError, match=r"at least length \+ 1 = 42 tokens, got 40 in the longest of 1 files"):
        long_documents(files[:1], ByteTokenizer(), 41, 2, "body")


def test_bytes_of_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    text = "the cat sat on the mat and the hat, Größe\n" * 30
    (tmp_path / "a.txt").write_text(text)
    train_tokenizer(str(tmp_path / "a.txt"), 300, tmp_path / "tokenizer.json")
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json", "text")
    (document,) = long_documents([tmp_path / "a.txt"], tokenizer, 100, 4)
    assert document.tokens.tolist() == tokenizer.encode(text)[:101]
    assert document.bytes.sum() == len("".join(tokenizer.decode_stream(document.tokens.tolist())).encode())
