"""`dma-lightning extrapolation`: a checkpoint's scores at lengths other than its training length."""

from pathlib import Path

from dma_lightning.data import SequenceDataModule
from dma_lightning.evaluation import Reader, TrainedRun, length_scores
from dma_lightning.evaluation.reports import (
    COST_COLUMNS,
    cost_cells,
    facts,
    new_file,
    number,
    percent,
    table_head,
    table_row,
    write_report,
)
from dma_lightning.evaluation.trained_run import LENGTH_FACTORS, possible_lengths


def extrapolation(
    ckpt_path: Path,
    lengths: list[int] | None = None,
    examples: int = 100,
    batch_size: int = 16,
    chunk_size: int = 2048,
    device: str | None = None,
    backend: str | None = None,
    path: str | None = None,
    tokenizer: str | None = None,
    full_cache: bool = False,
    output: Path | None = None,
) -> None:
    """Score a checkpoint at several sequence lengths on the test set of its data, and print a table.

    For text, the test set is the validation part. Lengths that the data cannot have are left out.

    Args:
        ckpt_path: a checkpoint.
        lengths: sequence lengths in tokens, as a YAML list such as '[64, 128]'. Default: 1/4, 1/2, 1, 1.5, 2, 4 and 8
            times the training length.
        examples: maximum number of sequences for each length.
        batch_size: sequences read at once.
        chunk_size: positions read at once.
        device: where to compute, such as cpu or cuda:1. Default: the GPU if there is one.
        backend: attention backend. Default: the checkpoint's.
        path: text, or a folder written by `prepare`. Default: the checkpoint's. Of plain text, only the last part is
            read, the same share that training set aside for validation.
        tokenizer: the checkpoint's tokenizer.json, if it has moved.
        full_cache: keep all keys, for comparison; apart from rounding, the results are the same.
        output: a JSON file to write all results to; it must not exist.
    """
    output = new_file(output)
    if examples < 1 or batch_size < 1:
        raise ValueError(f"expected examples and batch_size >= 1, got {examples} and {batch_size}")
    run = TrainedRun.open(ckpt_path, device, backend)
    reader = Reader(run.module.model, run.device, chunk_size, full_cache)
    is_prepared = False

    def data_at(length: int) -> SequenceDataModule:
        nonlocal is_prepared
        data = run.data(path, tokenizer=tokenizer, sequence_length=length)
        if not is_prepared:  # all lengths use the same files
            data.prepare_data()
            is_prepared = True
        data.setup("test")
        return data

    found = possible_lengths(run.lengths(lengths, LENGTH_FACTORS), data_at)
    columns = ("sequences", "loss", "tokens right, percent", "answers right, percent", "bits per byte")
    print(table_head(["length", *columns, *COST_COLUMNS]))
    rows = []
    for length, data in found.items():
        rows.append(row := length_scores(reader, data.test_set, examples, batch_size))
        shares = percent(row.accuracy), percent(row.answers)
        shown = [f"{row.sequences:,}", number(row.loss), *shares, number(row.bits_per_byte)]
        print(table_row([f"{length:,}", *shown, *cost_cells(row.cost)]), flush=True)
    print(f"\nThe training length is {run.training_length:,}.")
    if output is not None:
        batches = {"examples": examples, "batch_size": batch_size}
        write_report(output, facts(run, reader) | batches | {"lengths": [row.figures() for row in rows]})
