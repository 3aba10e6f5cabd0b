"""What it costs to weigh a step's batches by their labels: accumulated batches, and those of several processes.

    python benchmarks/gpu_step_means.py      half a minute on one GPU; a JSON file under benchmarks/results/

A step of one batch in one process pays nothing. Any other pays one pass over all gradients (`scale_gradients`), which
are float32 here, and one all-reduce of three numbers. The pass is timed for the shapes of two configs: median of
repeated calls, three times, and the share of the GPU's memory bandwidth that it reaches.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from environment import describe, write_tables
from triton.testing import do_bench

from dma_lightning.cli.sizes import read_config
from dma_lightning.model import DogeForCausalLM
from dma_lightning.step_means import scale_gradients

CONFIGS = Path(__file__).parents[1] / "configs"
SHAPES, TURNS = ["80m", "1.7b"], 3


def measure() -> Iterator[dict[str, Any]]:
    """One row by shape."""
    factor = torch.ones((), device="cuda")
    for shape in SHAPES:
        with torch.device("cuda"):
            model = DogeForCausalLM(read_config(CONFIGS / "model" / f"{shape}.yaml"))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        times = [
            do_bench(lambda m=model: scale_gradients(m.parameters(), factor), return_mode="median")
            for _ in range(TURNS)
        ]
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        terabytes = 2 * size / statistics.median(times) / 1e9
        yield {"shape": shape, "gib": size / 2**30, "ms": sorted(times), "terabytes_per_s": terabytes}


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_step_means.json")
    args = parser.parse_args()
    write_tables(args.out, {"environment": describe()}, {"weighing": measure()})


if __name__ == "__main__":
    main()
