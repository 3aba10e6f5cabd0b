"""The cost of weighting the batches of a step by their number of labels, if a step has several batches or processes.

A step with one batch in one process pays nothing. Any other step pays for one pass over all gradients
(`scale_gradients`), which are float32 here, and for one all-reduce of three numbers. The pass is timed for the shapes
of two configs: the median of repeated calls, three times, and the memory bandwidth that it reaches.
"""

from collections.abc import Iterator
from functools import partial

import torch

from dma_lightning.cli.sizes import read_config
from dma_lightning.model import DogeForCausalLM
from dma_lightning.step_means import scale_gradients
from harness import CONFIGS, CommandLine, Row, describe, record
from harness.timing import time_ms

SHAPES = ["80m", "1.7b"]


def measure() -> Iterator[Row]:
    """One row for each shape."""
    factor = torch.ones((), device="cuda")
    for shape in SHAPES:
        with torch.device("cuda"):
            model = DogeForCausalLM(read_config(CONFIGS / "model" / f"{shape}-published.yaml"))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        parameters = list(model.parameters())
        times = time_ms(partial(scale_gradients, parameters, factor))
        size = sum(p.nbytes for p in parameters)
        yield {"shape": shape, "gib": size / 2**30, "ms": times, "terabytes_per_s": 2 * size / times[1] / 1e9}


def main() -> None:
    """Measure, print, and write the JSON file."""
    args = CommandLine(__doc__, "gpu_step_means", gpus=1, duration="half a minute on an H200").parse_args()
    record(args.out, {"environment": describe()}, {"weighing": measure()})


if __name__ == "__main__":
    main()
