"""How the loss falls with the position in a document, as the context grows.

D documents, B of them at once, N positions, K buckets.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dma_lightning.data.text_formats import Piece, read_documents
from dma_lightning.evaluation.reading import Reader
from dma_lightning.losses import token_losses
from dma_lightning.tokenizers import ByteTokenizer, DataTokenizer

_FIRST = 64  # positions of the first bucket


@dataclass(frozen=True)
class Bucket:
    """The loss at a range of positions.

    Attributes:
        first: first position, counted from 0.
        last: last position, inclusive.
        documents: number of documents.
        loss: mean over documents, in nats per token.
        standard_error: standard error of that mean; None if there is only one document.
        bits_per_byte: loss in bits per byte of the text that the tokens stand for; None if they stand for none.
    """

    first: int
    last: int
    documents: int
    loss: float
    standard_error: float | None
    bits_per_byte: float | None


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Beginning:
    """The first tokens of a document, and how many bytes of it each stands for, int64 `[N + 1]` each."""

    tokens: np.ndarray
    bytes: np.ndarray


def long_documents(
    files: Sequence[Path],
    tokenizer: DataTokenizer,
    length: int,
    documents: int,
    text_field: str = "text",
    separator: str | None = None,
) -> list[Beginning]:
    """The beginnings of documents that have more than `length` tokens, in the order of the files.

    Args:
        files: text or JSONL, as `prepare` reads them.
        tokenizer: the model's tokenizer.
        length: N; a beginning has one more token, which is only predicted.
        documents: maximum number of documents to take.
        text_field: which field of a JSONL line, or which column, is the text.
        separator: what stands between the documents of a plain text. Default: each file is one document.

    Raises:
        ValueError: if there is none, or a file cannot be read.
    """
    found: list[Beginning] = []
    longest = 0
    for file in files:
        for beginning in _beginnings(tokenizer, length + 1, read_documents(file, text_field, separator=separator)):
            longest = max(longest, len(beginning.tokens))
            if len(beginning.tokens) > length:
                found.append(beginning)
            if len(found) == documents:
                return found
    if not found:
        raise ValueError(
            f"expected a document of at least length + 1 = {length + 1} tokens, got {longest} in the longest of "
            f"{len(files)} files; lower --length, or give longer documents"
        )
    return found


def position_buckets(reader: Reader, documents: Sequence[Beginning], batch_size: int) -> list[Bucket]:
    """The loss at positions of documents, in buckets whose ends double: 0 to 63, to 127, to 255, ...

    Args:
        reader: reads the documents.
        documents: beginnings with the same number of tokens.
        batch_size: number of documents to read at once.
    """
    length = len(documents[0].tokens) - 1
    ends = [_FIRST]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    ends[-1] = length
    bucket = torch.searchsorted(torch.tensor(ends), torch.arange(length), right=True)  # of each position
    tokens = torch.from_numpy(np.stack([document.tokens for document in documents]))
    with reader.inferring():
        nats = torch.cat([_bucket_nats(reader, rows, bucket, len(ends)) for rows in tokens.split(batch_size)])  # [D, K]
    of_position = torch.from_numpy(np.stack([document.bytes[1:] for document in documents])).sum(0)
    size = torch.zeros(len(ends), dtype=torch.int64).index_add_(0, bucket, of_position).tolist()  # bytes
    buckets = []
    for k, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        losses = nats[:, k] / (end - first)
        error = (losses.std() / math.sqrt(len(losses))).item() if len(losses) > 1 else None
        bits = nats[:, k].sum().item() / size[k] / math.log(2) if size[k] else None
        buckets.append(Bucket(first, end - 1, len(losses), losses.mean().item(), error, bits))
    return buckets


def _bucket_nats(reader: Reader, tokens: Tensor, bucket: Tensor, count: int) -> Tensor:
    """Sums of the losses of documents `[B, N + 1]` in each bucket, float64 `[B, K]`, within `inferring`."""
    tokens = tokens.to(reader.device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    nats = torch.zeros(len(tokens), count, dtype=torch.float64)
    for part, logits in reader.chunks(inputs):
        nats.index_add_(1, bucket[part], token_losses(logits, labels[:, part]).cpu().double())
    return nats


def _beginnings(tokenizer: DataTokenizer, count: int, pieces: Iterable[Piece]) -> Iterator[Beginning]:
    """The first `count` tokens of each document of a file; all tokens of a shorter one."""
    tokens: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    have = 0
    for piece in pieces:
        if have < count:  # skip the rest of the document up to its end
            ids, lengths = _tokens(tokenizer, piece.text)
            tokens, sizes, have = [*tokens, ids], [*sizes, lengths], have + len(ids)
        if piece.next_line != -1:
            yield Beginning(np.concatenate(tokens)[:count], np.concatenate(sizes)[:count])
            tokens, sizes, have = [], [], 0


def _tokens(tokenizer: DataTokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a text, and how many bytes of it each stands for, int64."""
    if isinstance(tokenizer, ByteTokenizer):
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        return ids, np.ones_like(ids)
    ids, ends = tokenizer.encode_with_ends(text)
    return ids, np.diff(ends, prepend=0)
