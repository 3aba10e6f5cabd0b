"""Train a shipped configuration with several seeds, through the command line, as a user would.

    python benchmarks/train_seeds.py mqar --seeds 0 1 2 3 4
    python benchmarks/train_seeds.py text --seeds 0

The result has the validation figure before training and at each validation, and the seconds that `fit` took in all
(start of the interpreter included). Further arguments are passed to `fit`.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import CONFIGS, CommandLine, Part, Result, Row, Table, describe, record
from harness.tables import cpu_of

TASKS = {
    "text": (["model/tiny", "data/pydoc", "trainer/cpu"], "val/bits_per_byte"),
    "mqar": (["model/mqar", "data/mqar", "trainer/mqar"], "val/accuracy"),
}


def train(task: str, seed: int, extra: list[str]) -> Row:
    """One run: its validation curve, and how many seconds it took."""
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


PYTHONS = ("3.11", "3.12", "3.13")
RESULTS = ("train_text", "train_mqar", "train_mqar_published", *(f"train_text_published_{x}" for x in PYTHONS))


def tables(text: Result, mqar: Result, mqar_published: Result, *published: Result) -> list[Part]:
    """What the pages show: text by form, Python version and seed; recall by form, seed and step."""
    texts = [("the shipped form", PYTHONS[0], text)]
    texts += [("as published", python, result) for python, result in zip(PYTHONS, published, strict=True)]
    recalls = [("the shipped form", run) for run in mqar["runs"]]
    recalls += [("as published", run) for run in mqar_published["runs"]]
    solved, seconds = sum(run["curve"][-1][1] >= 0.98 for _, run in recalls), [run["seconds"] for _, run in recalls]
    return [
        Table(
            [(form, python, run) for form, python, result in texts for run in result["runs"]],
            "**`make train`**, also with `configs/model/tiny-published.yaml`: bits per byte on the last tenth "
            f"of the text, before and after training on a CPU; lower is better ({cpu_of(text)}; as published: "
            f"{cpu_of(published[0])}; the same interpreter was used for the corpora of other Python "
            "versions). On a different processor, or with sums in a different order, the same seed gives a different "
            "result. The spread over seeds shows how large such differences are.",
            ["dynamic masks", "corpus: help topics of", "seed", "bits per byte at start", "at end", "seconds in all"],
            lambda row: [row[0], f"Python {row[1]}", *text_cells(row[2])],
        ),
        Table(
            [[form, run["seed"], *(f"{100 * value:.2f} %" for _, value in run["curve"])] for form, run in recalls],
            "**`make mqar`**, also with the model of `configs/model/mqar-published.yaml`: accuracy of recall on "
            "1,000 unseen examples, during training on a CPU; higher is better. "
            f"{solved} of {len(recalls)} runs end at 98 % or more, in {min(seconds):.0f} - {max(seconds):.0f} s each, "
            f"some of them on a busy machine ({cpu_of(mqar)}; as published: {cpu_of(mqar_published)}).",
            ["dynamic masks", "seed", *(f"step {step}" for step, _ in mqar["runs"][0]["curve"])],
        ),
    ]


def text_cells(run: Row) -> list[str]:
    """Seed, first and last figure, and seconds of a run."""
    return [f"{run['seed']}", f"{run['start']:.2f}", f"{run['curve'][-1][1]:.3f}", f"{run['seconds']:.0f}"]


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
