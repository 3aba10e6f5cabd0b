"""Training on all GPUs of a machine beside training on one of them: tokens/s of each, by DDP and by FSDP2.

    python benchmarks/gpu_scaling.py      seven minutes with two GPUs; a JSON file under benchmarks/results/

The runs of gpu_fit.py at 4k with `dma`, 32,768 random tokens a step for each GPU, started by torchrun. CUDA graphs
are for 80m on one GPU and with DDP; FSDP2 has none. A figure is what `SpeedMonitor` logs in the first process at each
logging step after the second: minimum, median and maximum.
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
from typing import Any

import torch
from environment import describe, write_tables
from gpu_fit import COMPILING, FIGURES, INTERVAL, RECOMPUTED, fit, spreads, write_corpus

STRATEGIES = {"one": "auto", "ddp": "ddp", "fsdp": "{class_path: dma_lightning.strategies.FullyShardedStrategy}"}
LENGTH, ATTENTION = 4096, "dma"


def train(shape: str, strategy: str, corpus: Path, row: Path) -> None:
    """What each process does; the first writes the row."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    every = INTERVAL[shape]
    processes = {"strategy": STRATEGIES[strategy], "devices": int(os.environ["WORLD_SIZE"])}
    graphs = shape != RECOMPUTED and strategy != "fsdp"
    steps = every * (COMPILING + FIGURES)
    found = fit(corpus, shape, LENGTH, ATTENTION, steps, every, graphs, profiled=0, processes=processes)
    if os.environ["RANK"] == "0":
        peak = torch.cuda.max_memory_allocated() / 2**30
        row.write_text(json.dumps(spreads(found.figures) | {"peak_gib": peak}))


def measure(gpus: int) -> Iterator[dict[str, Any]]:
    """One row by shape and strategy."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, row = Path(folder) / "corpus", Path(folder) / "row.json"
        corpus.mkdir()
        write_corpus(corpus)
        for strategy, shape in product(STRATEGIES, INTERVAL):
            processes = 1 if strategy == "one" else gpus
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            case = [shape, strategy, str(corpus), str(row)]
            subprocess.run([sys.executable, *torchrun, __file__, "--case", *case], check=True)
            yield {"shape": shape, "strategy": strategy, "gpus": processes} | json.loads(row.read_text())


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_scaling.json")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # LightningCLI warns of arguments that are not its own
    if args.case:
        shape, strategy, *paths = args.case
        train(shape, strategy, *map(Path, paths))
        return
    write_tables(args.out, {"environment": describe()}, {"runs": measure(torch.cuda.device_count())})


if __name__ == "__main__":
    main()
