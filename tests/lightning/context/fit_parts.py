"""One of four processes that train with Lightning and divide sequences; started by `test_fit_parts.py`.

    python fit_parts.py FOLDER

Checkpoints are written to the folder. The test compares them with those of one process.
"""

import os
import sys
from pathlib import Path

import torch
from fit_runs import DRIFT, RETENTION, train

PROCESSES = 4


def main(folder: Path) -> None:
    """Train with two groups of two processes, and with one group of four that continues a run of one process."""
    torch.set_num_threads(1)
    train(folder / "pairs", 2, 2, accumulate=2, **DRIFT)
    train(folder / "retention", 4, 1, accumulate=2, loss_chunk=7, **RETENTION)
    train(folder / "resumed", 4, 1, length=14, ckpt_path=folder / "one/step=4.ckpt", **DRIFT)
    recomputed = {"activation_checkpointing": True, "loss_chunk": 3}
    train(folder / "swa", 4, 1, length=14, attention="swa", sliding_window=5, **recomputed)
    errors = []
    for options in ({"parts": 3, "groups": 4 / 3}, {"parts": 4, "attention": "mha"}):
        try:
            train(folder / "none", **options)
        except ValueError as error:
            errors.append(str(error))
    if os.environ["RANK"] == "0":
        (folder / "errors.txt").write_text("\n".join(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
