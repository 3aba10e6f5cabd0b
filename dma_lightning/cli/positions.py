"""`dma-lightning positions`: the loss of a checkpoint on unseen documents, by position."""

from dataclasses import asdict
from pathlib import Path

from dma_lightning.data.find_files import text_files
from dma_lightning.data.text_formats import check_separator
from dma_lightning.evaluation import Reader, TrainedRun, position_buckets
from dma_lightning.evaluation.positions import long_documents
from dma_lightning.evaluation.reports import facts, new_file, number, table_head, table_row, write_report
from dma_lightning.tokenizers import SpecialTokens
from dma_lightning.trained_models import saved_tokenizer


def positions(
    ckpt_path: Path,
    path: str,
    length: int | None = None,
    documents: int = 64,
    batch_size: int = 8,
    chunk_size: int = 2048,
    text_field: str = "text",
    separator: str | None = None,
    special_tokens: SpecialTokens | None = None,
    device: str | None = None,
    backend: str | None = None,
    full_cache: bool = False,
    output: Path | None = None,
) -> None:
    """Print a text model's loss by position in the document, in buckets whose upper ends double.

    Args:
        ckpt_path: a checkpoint; its tokens are bytes, or those of the tokenizer in it or beside it.
        path: held-out text: a file, a folder or a glob of what `prepare` reads.
        length: number of positions to score in each document; documents with no more tokens than that are left out.
            Default: twice the training length.
        documents: maximum number of documents.
        batch_size: documents read at once.
        chunk_size: positions read at once.
        text_field: the field of a JSONL line, or the column, that holds the text.
        separator: text that stands between the documents of a plain text file. Default: each file is one document.
        special_tokens: whether the name of a special token in the text stays text (text) or becomes that token (parse).
            Default: as in the training data.
        device: where to compute, such as cpu or cuda:1. Default: the GPU if there is one.
        backend: attention backend. Default: the checkpoint's.
        full_cache: keep all keys, for comparison; apart from rounding, the results are the same.
        output: a JSON file to write all results to; it must not exist.
    """
    output = new_file(output)
    for name, value in (("length", length), ("documents", documents), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    run = TrainedRun.open(ckpt_path, device, backend)
    reader = Reader(run.module.model, run.device, chunk_size, full_cache)
    length = length or 2 * run.training_length
    tokenizer = saved_tokenizer(run.saved, run.module, special_tokens or run.saved.special_tokens)
    files = text_files(path)
    check_separator(separator, files)
    found = long_documents(files, tokenizer, length, documents, text_field, separator)
    buckets = position_buckets(reader, found, batch_size)
    print(table_head(["positions", "documents", "loss", "± standard error", "bits per byte"]))
    for bucket in buckets:
        figures = (bucket.loss, bucket.standard_error, bucket.bits_per_byte)
        cells = (f"{bucket.first:,} to {bucket.last:,}", f"{bucket.documents:,}", *map(number, figures))
        print(table_row(cells))
    mean = sum(bucket.loss * (bucket.last + 1 - bucket.first) for bucket in buckets) / length
    print(f"\nMean loss {mean:.4f} nats per token; the training length is {run.training_length:,}.")
    if output is not None:
        content = {"length": length, "documents": len(found), "batch_size": batch_size, "loss": mean}
        write_report(output, facts(run, reader) | content | {"buckets": [asdict(bucket) for bucket in buckets]})
