"""`dma-lightning needle`: measures whether a checkpoint finds needles, by length and depth."""

from dataclasses import asdict
from pathlib import Path

from dma_lightning.data.needles import DEPTHS
from dma_lightning.evaluation import NeedleGrid, Reader, TrainedRun, needle_cells
from dma_lightning.evaluation.needles import Cell, NeedleRow, means
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


def needle(
    ckpt_path: Path,
    lengths: list[int] | None = None,
    depths: list[float] | None = None,
    examples: int = 100,
    batch_size: int = 16,
    chunk_size: int = 2048,
    device: str | None = None,
    backend: str | None = None,
    path: str | None = None,
    full_cache: bool = False,
    output: Path | None = None,
) -> None:
    """Test whether a model trained on needles finds them at each length and depth, and print tables of scores.

    An answer is right if greedy decoding would give it: each token is the likeliest, given those before it. The
    examples come from fixed seeds for each length and depth, which training and validation do not use.

    Args:
        ckpt_path: a checkpoint of a model that was trained on needles.
        lengths: example lengths in tokens, as a YAML list such as '[64, 128]'. Default: 1/4, 1/2, 1, 1.5, 2, 4 and 8
            times the training length.
        depths: positions of the needle, in percent, as a YAML list. Default: 0, 10, ... 100.
        examples: number of examples for each length and depth.
        batch_size: examples read at once.
        chunk_size: positions read at once.
        device: where to compute, such as cpu or cuda:1. Default: the GPU if there is one.
        backend: attention backend. Default: the checkpoint's.
        path: text of the haystack, for needles in text. Default: the checkpoint's.
        full_cache: keep all keys, for comparison; apart from rounding, the answers are the same.
        output: a JSON file to write all results to; it must not exist.
    """
    output, grid = new_file(output), NeedleGrid(tuple(DEPTHS) if depths is None else depths, examples, batch_size)
    run = TrainedRun.open(ckpt_path, device, backend)
    reader = Reader(run.module.model, run.device, chunk_size, full_cache)
    data = run.haystacks(path)
    tasks = possible_lengths(run.lengths(lengths, LENGTH_FACTORS), data.task_at)
    print(f"Right whole answers in percent, by length and depth ({examples} examples each):\n")
    print(table_head(["length", *(f"{depth:g} %" for depth in grid.depths), "mean"]))
    rows = []
    for length, task in tasks.items():
        rows.append(needle_cells(reader, task, length, grid))
        shown = [percent(cell.answers) for cell in rows[-1].cells]
        print(table_row([f"{length:,}", *shown, percent(means(rows[-1].cells)["answers"])]), flush=True)
    cells = [cell for row in rows for cell in row.cells]
    inside = [cell for cell in cells if cell.length <= run.training_length]
    beyond = [cell for cell in cells if cell.length > run.training_length]
    _print_rest(rows, inside, beyond, run.training_length)
    if output is not None:
        figures = {"inside": means(inside), "beyond": means(beyond), "lengths": [row.figures() for row in rows]}
        batches = {"examples": examples, "batch_size": batch_size}
        write_report(output, facts(run, reader) | batches | figures | {"cells": [asdict(cell) for cell in cells]})


def _print_rest(rows: list[NeedleRow], inside: list[Cell], beyond: list[Cell], training_length: int) -> None:
    """Print the scores by length, and the means."""
    print(f"\n{table_head(['length', 'tokens right, percent', 'loss', *COST_COLUMNS])}")
    for row in rows:
        figures = means(row.cells)
        print(
            table_row([f"{row.length:,}", percent(figures["accuracy"]), number(figures["loss"]), *cost_cells(row.cost)])
        )
    answers = (percent(means(x)["answers"]) for x in (inside, beyond))
    print("\nRight whole answers in percent: {} inside and {} beyond".format(*answers), end=" ")
    print(f"the training length of {training_length:,}; by chance {100 * rows[0].chance:.2g}.")
