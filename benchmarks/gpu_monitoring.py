"""What monitoring a run costs on a GPU, validations and samples included.

The 80M model trains at 4k with configs/trainer/gpu.yaml, on random tokens as in gpu_fit.py. Layers are compiled and run
as CUDA graphs. The learning rate is low enough not to diverge on random tokens. Two turns of 1,000 steps have all
callbacks and the logger of the config, except checkpoints. Together they have 80 logging steps, four looks at the
masks, and four validations, one of which writes pictures and a sample. Two other turns have neither callbacks nor a
logger; they also clip gradients and validate on two batches. The first 520 steps compile kernels and write the first
sample; they do not count.
"""

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch

from harness import CommandLine, Part, Result, Row, describe, record
from harness.tables import gpu_of
from harness.training import TOKENS, Case, build, write_corpus

TURN, WARM_UP = 1000, 520  # steps; two validations of configs/trainer/gpu.yaml are one turn
ORDER = (True, False, False, True)


class Turns(pl.Callback):
    """Removes and restores all other callbacks and the loggers, turn by turn, and records how long each turn takes."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_train_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.all = {name: getattr(trainer, name) for name in ("callbacks", "loggers", "log_every_n_steps")}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        turn, place = divmod(trainer.global_step - WARM_UP, TURN)
        if turn < 0 or place:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        if turn:
            self.rows.append({"visible": ORDER[turn - 1], "step_ms": 1e3 * (now - self.started) / TURN})
            print(self.rows[-1], file=sys.stderr, flush=True)
        visible = turn < len(ORDER) and ORDER[turn]
        nothing = {"callbacks": [self], "loggers": [], "log_every_n_steps": sys.maxsize}
        for name, value in (self.all if visible else nothing).items():
            setattr(trainer, name, value)
        self.started = now


def measure() -> Iterator[Row]:
    """One row for each turn: whether monitoring was on, and milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus)
        trainer = {"max_steps": WARM_UP + TURN * len(ORDER) + 1, "limit_val_batches": 2, "num_sanity_val_steps": 0}
        trainer["logger.init_args.save_dir"] = folder
        cli = build(corpus, Case("80m", 4096, "dma"), trainer, {"cuda_graphs": True, "lr": 1e-5})
        turns = Turns()
        cli.trainer.callbacks = [turns, *cli.trainer.callbacks]
        with contextlib.redirect_stdout(io.StringIO()):
            cli.trainer.fit(cli.model, cli.datamodule)
    yield from turns.rows


def tables(result: Result) -> list[Part]:
    """What the pages say: how much longer a step takes."""
    on, off = ([row["step_ms"] for row in result["turns"] if row["visible"] is which] for which in (True, False))
    with_, without = (" and ".join(f"{time:.2f}" for time in times) for times in (on, off))
    return [
        "**`python benchmarks/gpu_monitoring.py`**: how much monitoring lengthens a training step of 80m at 4k on a "
        "GPU; lower is better. With all callbacks of `configs/trainer/gpu.yaml` except checkpoints, and with "
        f"validations and samples, a step takes {sum(on) / sum(off) - 1:.1%} longer ({with_} ms) than without "
        f"callbacks and logger ({without} ms). Each was measured twice, for 1,000 steps "
        f"({gpu_of(result)})."
    ]


def main() -> None:
    """Measure, print, and write the JSON file."""
    args = CommandLine(__doc__, "gpu_monitoring", gpus=1, duration="five minutes on an H200").parse_args()
    record(args.out, {"environment": describe() | {"tokens_per_step": TOKENS}}, {"turns": measure()}, tables)


if __name__ == "__main__":
    main()
