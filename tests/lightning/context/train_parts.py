"""One of four processes that train on parts of the same sequences, together or in pairs; started by `test_parts.py`.

    python train_parts.py FOLDER

Weights are written to the folder. The test compares them with those of one process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from context_runs import RUNS, train

from dma_kernels.context import ContextGroup

PROCESSES = 4


def main(folder: Path) -> None:
    """Make all runs of four processes, and those of two, which are divided between the pairs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    processes = {PROCESSES: dist.group.WORLD, 2: pairs[rank // 2]}
    found = {}
    for number, run in enumerate(RUNS):
        if run.parts == PROCESSES or number % 2 == rank // 2:
            group = processes[run.parts]
            found[run.name] = train(run, ContextGroup.of(group), group)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
