"""`dma-lightning positions`: the loss of a checkpoint by the position in documents that it has not seen."""

from dataclasses import asdict
from pathlib import Path

from dma_lightning.data.find_files import text_files
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
    special_tokens: SpecialTokens | None = None,
    device: str | None = None,
    backend: str | None = None,
    full_cache: bool = False,
    output: Path | None = None,
) -> None:
    """Print the loss of a model of text by the position in a document, in buckets whose ends double.

    Args:
        ckpt_path: a checkpoint; its tokens are bytes, or those of the tokenizer in it or beside it.
        path: held-out text: a file, a folder or a glob of text or JSONL, also .gz and .zst, as `prepare` reads it.
        length: positions of a document that count; those that have no more tokens are left out. Default: twice the
            training length.
        documents: how many to read at most.
        batch_size: documents that are read at once.
        chunk_size: positions that are read at once.
        text_field: which field of a JSONL line is the text.
        special_tokens: whether text that spells a special token of the tokenizer stays text, or becomes it (parse).
            Default: as in the training data.
        device: where to compute, such as cpu or cuda:1; by default the GPU if there is one.
        backend: attention backend, if not the checkpoint's.
        full_cache: keep all keys, for comparison; but for rounding, the figures are the same.
        output: a JSON file to write all figures to; none may be there.
    """
    output = new_file(output)
    for name, value in (("length", length), ("documents", documents), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    run = TrainedRun.open(ckpt_path, device, backend)
    reader = Reader(run.module.model, run.device, chunk_size, full_cache)
    length = length or 2 * run.training_length
    tokenizer = saved_tokenizer(run.saved, run.module, special_tokens or run.saved.special_tokens)
    found = long_documents(text_files(path), tokenizer, length, documents, text_field)
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
