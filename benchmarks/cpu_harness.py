"""Scores of lm-evaluation-harness on a CPU: small models with different attentions, side by side.

Each model has 0.8M parameters and is trained as in `make train`: 800 steps on the bytes of Python's help topics, in
sequences of 256. `dma-lightning evaluate` then runs two tasks on text that the models have not seen (the last 9 % of
the topics):

- `continuation`: a text of 200 characters, and four ways to go on for 40 characters. One of them is right; the others
  come from elsewhere in this text. Guessing gets 25 %.
- `pages`: bits per byte of pages of 2,000 characters. The harness cuts them into windows of 256 tokens.

Two trainings run at a time, each with one thread. This needs the extra `eval`.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, stdev

from harness import CommandLine, Part, Result, Row, Table, describe, record
from harness.tables import cpu_of

SWA = ["--model.attention=swa", "--model.sliding_window=64"]
FORMS = {
    "dynamic masks, shipped": ["-c", "tiny"],
    "dynamic masks, as published": ["-c", "tiny-published"],
    "sliding window with gates": ["-c", "tiny", *SWA],
    "sliding window": ["-c", "tiny-published", *SWA],
    "full attention with gates": ["-c", "tiny", "--model.attention=mha"],
    "full attention": ["-c", "tiny-published", "--model.attention=mha"],
}
QUESTIONS, CONTEXT, ANSWER, PAGE = 500, 200, 40, 2000
TASKS = {
    "continuation": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}  # fmt: skip


def write_tasks(folder: Path) -> None:
    """YAML files of the tasks, and their documents as JSON Lines."""
    whole = "\n".join(topic.strip() for topic in topics.values())
    text = whole[-9 * len(whole) // 100 :]
    generator = random.Random(0)
    questions = []
    for _ in range(QUESTIONS):
        starts = [generator.randrange(CONTEXT, len(text) - ANSWER) for _ in range(4)]
        right = generator.randrange(4)
        choices = [text[start : start + ANSWER] for start in starts]
        context = text[starts[right] - CONTEXT : starts[right]]
        questions.append({"text": context, "choices": choices, "answer": right})
    pages = [{"page": text[i : i + PAGE]} for i in range(0, len(text), PAGE)]
    for name, documents in (("continuation", questions), ("pages", pages)):
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, documents)))
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (folder / f"{name}.yaml").write_text(json.dumps(task | {"test_split": "test"} | TASKS[name]))


def measure(folder: Path, form: str, seed: int) -> Row:
    """Train a model, and evaluate it."""
    runs, output = folder / f"{form}-{seed}", folder / f"{form}-{seed}.json"
    options = [*FORMS[form], "-c", "pydoc", "-c", "cpu", f"--seed_everything={seed}", "--sample_monitor=null"]
    options += ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={runs}"]
    run("fit", *options)
    (checkpoint,) = runs.rglob("last.ckpt")
    tasks = [f"--tasks={','.join(TASKS)}", f"--include_path={folder}", "--prefix_token_id=10"]
    run("evaluate", f"--ckpt_path={checkpoint}", *tasks, f"--output={output}")
    found = {row["metric"]: row["value"] for row in json.loads(output.read_text())["results"]}
    return {"form": form, "seed": seed, "accuracy": found["acc"], "bits_per_byte": found["bits_per_byte"]}


def run(*arguments: str) -> None:
    """A command of `dma-lightning`, with one thread and without the network."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "dma_lightning", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)


def measure_all(folder: Path, seeds: list[int]) -> Iterator[Row]:
    """A row for each form and seed."""
    write_tasks(folder)
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda case: measure(folder, case[1], case[0]), product(seeds, FORMS))


def tables(result: Result) -> list[Part]:
    """What the page shows: a row for each form."""
    rows = []
    for form in FORMS:
        scores = [
            [row[name] for row in result["scores"] if row["form"] == form] for name in ("accuracy", "bits_per_byte")
        ]
        rows.append([form, *(f"{mean(x):.3f} ± {stdev(x):.3f}" for x in scores)])
    seeds = len({row["seed"] for row in result["scores"]})
    return [
        Table(
            rows,
            f"Scores of two tasks of lm-evaluation-harness, mean and standard deviation of {seeds} seeds "
            f"({cpu_of(result)}). Higher accuracy and fewer bits are better; guessing gets an accuracy of 0.25:",
            ["attention", "accuracy of continuations", "bits per byte of pages"],
        )
    ]


def main() -> None:
    """Train, evaluate and write the JSON file after each model."""
    line = CommandLine(__doc__, "cpu_harness", duration="about half an hour on two cores")
    line.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    args = line.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(Path(folder), args.seeds)
        record(args.out, {"environment": describe()}, {"scores": rows}, tables)


if __name__ == "__main__":
    main()
