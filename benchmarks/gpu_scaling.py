"""Training on all GPUs of a machine, with DDP and FSDP2, compared with training on one: tokens/s of each GPU.

The runs are those of gpu_fit.py at 4k with `dma`, with 32,768 random tokens per step and GPU, started by torchrun. 80m
uses CUDA graphs on one GPU and with DDP, but not with FSDP2. Each figure is the minimum, median and maximum of what
`SpeedMonitor` logs in the first process at each logging step after the second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from harness import CommandLine, Part, Result, Row, Table, describe, record
from harness.tables import gpu_of, interval
from harness.training import COMPILING, FIGURES, INTERVAL, RECOMPUTED, Case, LoggedFigures, fit, write_corpus

STRATEGIES = {"one": "auto", "ddp": "ddp", "fsdp": "{class_path: dma_lightning.strategies.FullyShardedStrategy}"}
LENGTH, ATTENTION = 4096, "dma"


def train(shape: str, strategy: str, corpus: Path, row: Path) -> None:
    """Train in each process; the first process writes the row."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    every = INTERVAL[shape]
    options = {"strategy": STRATEGIES[strategy], "devices": int(os.environ["WORLD_SIZE"])}
    options |= {"max_steps": every * (COMPILING + FIGURES) + 1, "log_every_n_steps": every}
    graphs = shape != RECOMPUTED and strategy != "fsdp"
    found = LoggedFigures()
    fit(corpus, Case(shape, LENGTH, ATTENTION), found, options, graphs=graphs)
    if os.environ["RANK"] == "0":
        peak = torch.cuda.max_memory_allocated() / 2**30
        row.write_text(json.dumps(found.spreads() | {"peak_gib": peak}))


def measure(gpus: int) -> Iterator[Row]:
    """One row for each shape and strategy."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, row = Path(folder) / "corpus", Path(folder) / "row.json"
        write_corpus(corpus)
        for strategy, shape in product(STRATEGIES, INTERVAL):
            processes = 1 if strategy == "one" else gpus
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            case = [shape, strategy, str(corpus), str(row)]
            subprocess.run([sys.executable, *torchrun, __file__, "--case", *case], check=True)
            yield {"shape": shape, "strategy": strategy, "gpus": processes} | json.loads(row.read_text())


def tables(result: Result) -> list[Part]:
    """What the pages show: a row for each model, a column for each strategy."""
    runs = {(row["shape"], row["strategy"]): row for row in result["runs"]}

    def cell(shape: str, strategy: str) -> str:
        row, alone = runs[shape, strategy], runs[shape, "one"]
        share = "" if row is alone else f", {row['tokens_per_s'][1] / alone['tokens_per_s'][1]:.1%}"
        return f"{interval(row['tokens_per_s'], 1e3)}{share}, {row['peak_gib']:.0f} GiB"

    return [
        Table(
            [[shape, *(cell(shape, strategy) for strategy in STRATEGIES)] for shape in INTERVAL],
            "**`python benchmarks/gpu_scaling.py`**: thousands of tokens per second of each GPU (higher is better), "
            f"and its peak memory, when one GPU and when {max(row['gpus'] for row in result['runs'])} GPUs train. "
            "These are the runs above at 4k with `dma`, with the same number of tokens per GPU; FSDP2 has no CUDA "
            "graphs. Median [min - max] of 3 intervals, and the percentage of the speed of one GPU "
            f"({gpu_of(result)}):",
            ["model", "one GPU", "DDP", "FSDP2"],
        )
    ]


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "gpu_scaling", gpus=2, duration="seven minutes on two H200")
    line.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    args = line.parse_args()
    if args.case:
        shape, strategy, *paths = args.case
        train(shape, strategy, *map(Path, paths))
        return
    record(args.out, {"environment": describe()}, {"runs": measure(torch.cuda.device_count())}, tables)


if __name__ == "__main__":
    main()
