"""Kill `fit` at random moments, go on with `ckpt_path: last`, and compare every loss with the uninterrupted run's.

    python benchmarks/kill_runs.py --kills 100

A run has dropout, gradient accumulation over batches of which an epoch has no multiple, a schedule, validations also
between optimizer steps, and several epochs. It is killed (SIGKILL) and resumed until it has finished; then the next
begins, until there were as many kills. Every loss of a batch and of a validation must be that of the uninterrupted run
bit for bit, whenever it is computed, and so must the weights at the end. A process is forked from one that has imported
all, so that a kill costs no imports; it goes through the whole command line.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import lightning.pytorch as pl
import torch
from environment import describe
from torch import Tensor

from dma_lightning.cli import build_cli

OPTIONS = [
    "--model.num_hidden_layers=1",
    "--model.hidden_size=16",
    "--model.intermediate_size=16",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=1",
    "--model.keep_window_size=4",
    "--model.hidden_dropout=0.2",
    "--data=dma_lightning.MQARDataModule",
    "--data.sequence_length=16",
    "--data.num_pairs=2",
    "--data.batch_size=4",
    "--data.train_examples=52",  # 13 batches: the last of an epoch is a step of its own
    "--data.val_examples=6",
    "--trainer.accelerator=cpu",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=5",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.gradient_clip_val=1.0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=dma_lightning.stability.GradientGuard",
    "--trainer.callbacks+=dma_lightning.checkpoints.ResumableCheckpoint",
    "--trainer.callbacks.every_n_train_steps=3",
    "--trainer.callbacks+=kill_runs.Recorder",
]
LOGGER = [
    "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
    "--trainer.logger.save_dir=runs",
    "--trainer.logger.name=killed",
]


class Recorder(pl.Callback):
    """Appends what is computed to `losses.jsonl` in the working folder: the kind, how many batches came, the number."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict, *_: object) -> None:
        self._write(trainer, "loss", outputs["loss"])
        self._write(trainer, "learning rate", torch.tensor(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "validation", trainer.callback_metrics["val/loss"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        digest = hashlib.sha256()
        for tensor in pl_module.model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        Path("weights.txt").write_text(digest.hexdigest())

    @staticmethod
    def _write(trainer: pl.Trainer, kind: str, value: Tensor) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        with Path("losses.jsonl").open("a") as file:
            file.write(json.dumps([kind, batches, value.double().item().hex()]) + "\n")


def start(folder: Path, steps: int) -> int:
    """Fork a process that runs in a folder, with its output in `log.txt`; the process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        # By lines, so that a kill loses none; open until the process ends. Some loggers have kept the old streams.
        sys.stdout = sys.stderr = Path("log.txt").open("a", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        fit(steps)
        code = 0
    except BaseException:  # SystemExit, too: nothing of the parent's must run here
        traceback.print_exc()
    os._exit(code)


def fit(steps: int) -> None:
    """Begin or go on with the run of the working folder."""
    torch.set_num_threads(1)
    build_cli(["fit", *OPTIONS, *LOGGER, f"--trainer.max_steps={steps}", "--ckpt_path=last"])


def finish(folder: Path, steps: int) -> None:
    """Run without an interruption.

    Raises:
        RuntimeError: if it fails.
    """
    _, status = os.waitpid(start(folder, steps), 0)
    check_status(folder, status)


def check_status(folder: Path, status: int) -> None:
    """Raise `RuntimeError`, with the end of its log, unless a run ended well."""
    if code := os.waitstatus_to_exitcode(status):
        log = folder / "log.txt"
        text = log.read_text()[-3000:] if log.exists() else "no log"
        raise RuntimeError(f"a run ended with {code} (below 0: a signal): {text}")


def recorded(folder: Path) -> tuple[dict[tuple[str, int], set[str]], str]:
    """Every number that a run computed, and the digest of its weights."""
    curve: dict[tuple[str, int], set[str]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        kind, batches, value = json.loads(line)
        curve.setdefault((kind, batches), set()).add(value)
    return curve, (folder / "weights.txt").read_text()


def killed_run(folder: Path, steps: int, most: int, random_: random.Random, seconds: float) -> list[dict[str, object]]:
    """Kill and resume a run until it has finished, at most so many times.

    A kill comes within `seconds` of the start (one of four) or of the first batch that is new.
    """
    kills: list[dict[str, object]] = []
    while len(kills) < most:
        before, after = _batches(folder), random_.uniform(0, seconds)
        process = start(folder, steps)
        begun = time.monotonic() if random_.random() < 0.25 else None
        ended, status = 0, 0
        while not ended and (begun is None or time.monotonic() < begun + after):
            time.sleep(0.002)
            if begun is None and _batches(folder) > before:
                begun = time.monotonic()
            ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            check_status(folder, status)
            return kills
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        unfinished = len(list(folder.glob("runs/**/*.tmp")))
        kills.append({"new_batches": _batches(folder) - before, "unfinished_files_so_far": unfinished})
    finish(folder, steps)
    return kills


def _batches(folder: Path) -> int:
    """Computed so far, repeated ones included."""
    losses = folder / "losses.jsonl"
    return losses.read_text().count('"loss"') if losses.exists() else 0


def compare(folder: Path, whole: Path) -> int:
    """Numbers that were compared, replays included.

    Raises:
        RuntimeError: if one differs from the uninterrupted run's.
    """
    expected, weights = recorded(whole)
    found, found_weights = recorded(folder)
    wrong = {key: (values, expected.get(key)) for key, values in found.items() if values != expected.get(key)}
    if wrong or found.keys() != expected.keys() or weights != found_weights:
        missing = expected.keys() - found.keys()
        raise RuntimeError(f"{folder} differs from {whole}: {wrong}, missing {missing}, {weights}, {found_weights}")
    return len((folder / "losses.jsonl").read_text().splitlines())


def kill_runs(folder: Path, kills: int, steps: int, seed: int = 0) -> list[dict[str, object]]:
    """Kill so often; one dictionary for each run.

    Raises:
        RuntimeError: if anything differs from the uninterrupted run.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    finish(whole, steps)
    created = (whole / "runs").stat().st_ctime  # before the first batch
    seconds = (whole / "weights.txt").stat().st_mtime - created
    seconds /= 3  # several kills a run
    runs: list[dict[str, object]] = []
    random_ = random.Random(seed)
    while (left := kills - sum(len(run["kills"]) for run in runs)) > 0:
        run = folder / f"run{len(runs)}"
        run.mkdir()
        made = killed_run(run, steps, left, random_, seconds)
        runs.append({"kills": made, "numbers_compared": compare(run, whole)})
        print(f"run {len(runs)}: {len(made)} kills, {runs[-1]['numbers_compared']} numbers equal", flush=True)
        shutil.rmtree(run)
    return runs


def main() -> None:
    """Kill, compare, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_runs.json")
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # LightningCLI looks at them
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = kill_runs(Path(folder), args.kills, args.steps, args.seed)
    result = {
        "environment": describe(),
        "arguments": {"kills": args.kills, "seed": args.seed, "steps": args.steps, "options": [*OPTIONS, *LOGGER]},
        "kills": sum(len(run["kills"]) for run in runs),
        "numbers_compared": sum(run["numbers_compared"] for run in runs),
        "seconds": round(time.monotonic() - began, 1),
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['kills']} kills, {result['numbers_compared']} numbers, all equal; written to {args.out}")


if __name__ == "__main__":
    main()
