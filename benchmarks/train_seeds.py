"""Train a shipped configuration with several seeds, by the command line as a user would.

    python benchmarks/train_seeds.py mqar --seeds 0 1 2 3 4
    python benchmarks/train_seeds.py text --seeds 0

Prints the validation figure before training and at each validation, and the seconds that `fit` took in all (start of
the interpreter included). Further arguments go to `fit`.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.command_line import CommandLine
from harness.environment import describe
from harness.results import CONFIGS, Row, record

TASKS = {
    "text": (["model/tiny", "data/pydoc", "trainer/cpu"], "val/bits_per_byte"),
    "mqar": (["model/mqar", "data/mqar", "trainer/mqar"], "val/accuracy"),
}


def train(task: str, seed: int, extra: list[str]) -> Row:
    """One run: the curve of the validation figure, and seconds."""
    configs, metric = TASKS[task]
    args = [arg for name in configs for arg in ("-c", str(CONFIGS / f"{name}.yaml"))]
    with tempfile.TemporaryDirectory() as folder:
        args += [f"--seed_everything={seed}", f"--trainer.logger.init_args.save_dir={folder}", *extra]
        start = time.perf_counter()
        command = [sys.executable, "-m", "dma_lightning", "fit", *args]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        (events,) = Path(folder).rglob("events.out.tfevents.*")
        reader = EventAccumulator(str(events), size_guidance={"scalars": 0})
        reader.Reload()
        curve = [(event.step + 1, round(event.value, 4)) for event in reader.Scalars(metric)]
    start_figure = float(re.search(rf"{metric}: ([\d.]+) at start", done.stdout).group(1))
    return {"seed": seed, "seconds": round(seconds, 1), "metric": metric, "start": start_figure, "curve": curve}


def main() -> None:
    """Train with every seed, print a line each and write the JSON file."""
    line = CommandLine(__doc__, "train_{task}", duration="about two minutes a seed on two cores")
    line.add_argument("task", choices=TASKS)
    line.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: 0 1 2 3 4)")
    args, extra = line.parse_known_args()
    runs = (train(args.task, seed, extra) for seed in args.seeds)
    record(args.out, {"environment": describe(), "arguments": extra}, {"runs": runs})


if __name__ == "__main__":
    main()
