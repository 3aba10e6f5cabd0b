"""Kill `fit` at random moments, resume with `ckpt_path: last`, and compare every loss with the uninterrupted run.

    python tests/lightning/kill_runs.py --kills 100

There are four kinds of runs: `mqar`, a plain one; `text`, with all callbacks of `configs/trainer/cpu.yaml`, packed
documents and data workers; `processes`, two processes with DDP; and `context`, two processes that divide each sequence.
If there are two processes, one is killed, and the other must end within a minute, unless it has not begun to train. All
runs have several epochs, dropout, gradient accumulation, a schedule, and validations even between optimizer steps. The
number of batches in an epoch is not a multiple of the accumulated ones.

A run is killed (SIGKILL) and resumed until it has finished. Then the next run begins, until the requested number of
kills is reached. Each loss of a batch or validation must equal that of the uninterrupted run bit for bit, even if it is
computed repeatedly, and so must the final weights. Processes are forked from one that has already imported everything,
so a kill does not cost time for imports. They still go through the whole command line.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from benchmarks.harness.environment import describe
from dma_lightning.cli import build_cli
from dma_lightning.cli.default_callbacks import DEFAULT_CALLBACKS
from dma_lightning.cli.prepare import prepare

MODEL = [
    "--model.num_hidden_layers=1",
    "--model.hidden_size=16",
    "--model.intermediate_size=16",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=1",
    "--model.keep_window_size=4",
    "--model.hidden_dropout=0.2",
]
MQAR = [
    "--data=dma_lightning.MQARDataModule",
    "--data.sequence_length=16",
    "--data.num_pairs=2",
    "--data.batch_size=4",
    "--data.train_examples=52",  # 13 batches: the last of an epoch is a step of its own
    "--data.val_examples=6",
]
TRAINING = [
    "--trainer.accelerator=cpu",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=5",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.gradient_clip_val=1.0",
    "--trainer.enable_progress_bar=false",
    *(f"--{name}=null" for name in DEFAULT_CALLBACKS if name not in ("guard", "checkpoint")),
    "--checkpoint.every_n_train_steps=3",
    "--trainer.callbacks+=kill_runs.Recorder",
]
OPTIONS = [*MODEL, *MQAR, *TRAINING]
SHORT = ["--data.sequence_length=15", "--data.batch_size=4"]
LOGGER = [
    "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
    "--trainer.logger.save_dir=runs",
    "--trainer.logger.name=killed",
]
ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "configs" / "trainer" / "cpu.yaml"


@dataclass(frozen=True)
class Kind:
    """A kind of run: the arguments of `fit`, and the number of processes."""

    options: list[str]
    processes: int = 1


def kinds(folder: Path) -> dict[str, Kind]:
    """All kinds by name. The text and the configuration that `text` needs are written to a folder."""
    return {
        "mqar": Kind([*OPTIONS, *LOGGER]),
        "text": Kind(_text_options(folder)),
        "processes": Kind([*OPTIONS, *LOGGER, "--trainer.strategy=ddp", "--trainer.devices=2"], processes=2),
        "context": context_kind(folder),
    }


def context_kind(folder: Path) -> Kind:
    """Of 13 batches, half of each sequence in a process."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i}: {i * i % 97}\n" for i in range(200))[:880])
    strategy = ["--trainer.strategy=dma_lightning.strategies.FullyShardedStrategy", "--trainer.devices=2"]
    data = ["--data=dma_lightning.TextDataModule", f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]
    options = [*strategy, "--trainer.strategy.context_parallel_size=2", *data, *SHORT]
    return Kind([*MODEL, *options, *TRAINING, *LOGGER], processes=2)


def _text_options(folder: Path) -> list[str]:
    texts = [f"document {i} of {i % 9} things; " * (2 + i % 5) for i in range(46)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(str(folder / "text.jsonl"), folder / "prepared", processes=1)
    config = yaml.safe_load(TRAINER.read_text())
    often = {"log_every_n_steps": 2, "val_check_interval": 5, "accumulate_grad_batches": 2, "num_sanity_val_steps": 1}
    config["trainer"] |= often
    config |= {"checkpoint": {"every_n_train_steps": 3}, "mask_monitor": {"every_n_steps": 8}}
    config["trainer"]["callbacks"] = [{"class_path": "kill_runs.Recorder"}]
    (folder / "trainer.yaml").write_text(yaml.safe_dump(config))
    data = [f"--data.path={folder / 'prepared'}", "--data.sequence_length=64", "--data.val_fraction=0.1"]
    data = ["--data=dma_lightning.PreparedDataModule", *data, "--data.batch_size=4", "--data.num_workers=2"]
    return [f"--config={folder / 'trainer.yaml'}", *MODEL, *data]


class Recorder(pl.Callback):
    """Appends figures to `losses.jsonl` in the working folder: kind, number of batches so far, and value of each."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict, *_: object) -> None:
        self._write(trainer, "loss", outputs["loss"])
        self._write(trainer, "learning rate", torch.tensor(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "validation", trainer.callback_metrics["val/loss"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        digest = hashlib.sha256()
        for tensor in pl_module.model.state_dict().values():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digest.update(whole.numpy().tobytes())
        if trainer.is_global_zero:
            Path("weights.txt").write_text(digest.hexdigest())

    @staticmethod
    def _write(trainer: pl.Trainer, kind: str, value: Tensor) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        line = json.dumps([f"{kind} of rank {trainer.global_rank}", batches, value.double().item().hex()])
        with Path("losses.jsonl").open("a") as file:
            file.write(line + "\n")


def start(folder: Path, steps: int, kind: Kind) -> list[int]:
    """Fork the processes of a run in a folder, with their output in `log.txt`; their ids."""
    if kind.processes == 1:
        return [_fork(folder, steps, kind, {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    number = str(kind.processes)
    common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "kill_runs"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = map(str, range(kind.processes))
    return [_fork(folder, steps, kind, common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]


def _fork(folder: Path, steps: int, kind: Kind, environment: dict[str, str]) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(environment)
        os.chdir(folder)
        # By lines, so that a kill loses none; open until the process ends. Some loggers have kept the old streams.
        sys.stdout = sys.stderr = Path("log.txt").open("a", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is shared by all that are forked, and a killed one never lets it go
        build_cli(["fit", *kind.options, f"--trainer.max_steps={steps}", "--ckpt_path=last"])
        code = 0
    except BaseException:  # SystemExit, too: nothing of the parent's must run here
        traceback.print_exc()
    os._exit(code)


def finish(folder: Path, steps: int, kind: Kind) -> None:
    """Run without an interruption.

    Raises:
        RuntimeError: if the run fails.
    """
    for process in start(folder, steps, kind):
        check_status(folder, os.waitpid(process, 0)[1])


def check_status(folder: Path, status: int) -> None:
    """Raise a `RuntimeError` with the end of the run's log, unless the run succeeded."""
    if code := os.waitstatus_to_exitcode(status):
        log = folder / "log.txt"
        text = log.read_text()[-3000:] if log.exists() else "no log"
        raise RuntimeError(f"a run ended with {code} (below 0: a signal): {text}")


def recorded(folder: Path) -> tuple[dict[tuple[str, int], set[str]], str]:
    """Every figure that a run computed, and the digest of its weights."""
    curve: dict[tuple[str, int], set[str]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        kind, batches, value = json.loads(line)
        curve.setdefault((kind, batches), set()).add(value)
    return curve, (folder / "weights.txt").read_text()


def killed_run(
    folder: Path, steps: int, kind: Kind, most: int, random_: random.Random, seconds: float
) -> list[dict[str, object]]:
    """Kill and resume a run until it has finished, with at most the given number of kills.

    A kill comes within `seconds` of the start (one in four) or of the first batch that is new.
    """
    kills: list[dict[str, object]] = []
    while len(kills) < most:
        before, after = _batches(folder), random_.uniform(0, seconds)
        first, *others = processes = start(folder, steps, kind)
        begun = time.monotonic() if random_.random() < 0.25 else None
        ended, status = 0, 0
        while not ended and (begun is None or time.monotonic() < begun + after):
            time.sleep(0.002)
            if begun is None and _batches(folder) > before:
                begun = time.monotonic()
            ended, status = os.waitpid(first, os.WNOHANG)
        if ended:
            check_status(folder, status)
            for process in others:
                check_status(folder, os.waitpid(process, 0)[1])
            return kills
        killed = random_.choice(processes)
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        unfinished = len(list(folder.glob("runs/**/*.tmp")))
        kill = {"new_batches": _batches(folder) - before, "unfinished_files_so_far": unfinished}
        if others:
            (other,) = (process for process in processes if process != killed)
            if not kill["new_batches"]:  # before both have met, what started them must end them, as torchrun does
                os.kill(other, signal.SIGKILL)
            kill |= {"killed_rank": processes.index(killed), "seconds_to_the_other's_end": await_end(folder, other)}
        kills.append(kill)
    finish(folder, steps, kind)
    return kills


def await_end(folder: Path, process: int, most: float = 60.0) -> float:
    """How long a process takes to end, in seconds.

    Raises:
        RuntimeError: if it takes longer than a minute.
    """
    began = time.monotonic()
    while not os.waitpid(process, os.WNOHANG)[0]:
        if time.monotonic() > began + most:
            os.kill(process, signal.SIGKILL)
            raise RuntimeError(f"{folder}: a process still ran {most:.0f} s after the other was killed")
        time.sleep(0.01)
    return round(time.monotonic() - began, 2)


def _batches(folder: Path) -> int:
    """Number of batches computed so far, including repeated ones."""
    losses = folder / "losses.jsonl"
    return losses.read_text().count('"loss of rank 0"') if losses.exists() else 0


def compare(folder: Path, whole: Path) -> int:
    """Compare a run with the uninterrupted one; how many figures were compared, including repeated ones.

    Raises:
        RuntimeError: if a figure differs.
    """
    expected, weights = recorded(whole)
    found, found_weights = recorded(folder)
    wrong = {key: (values, expected.get(key)) for key, values in found.items() if values != expected.get(key)}
    if wrong or found.keys() != expected.keys() or weights != found_weights:
        missing = expected.keys() - found.keys()
        raise RuntimeError(f"{folder} differs from {whole}: {wrong}, missing {missing}, {weights}, {found_weights}")
    return len((folder / "losses.jsonl").read_text().splitlines())


def kill_runs(folder: Path, kind: Kind, kills: int, steps: int, seed: int = 0) -> list[dict[str, object]]:
    """Kill runs as often as requested; one dictionary for each run.

    Raises:
        RuntimeError: if anything differs from the uninterrupted run, or a process does not end after another is killed.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    finish(whole, steps, kind)
    created = (whole / "runs").stat().st_ctime  # before the first batch
    seconds = (whole / "weights.txt").stat().st_mtime - created
    seconds /= 3  # several kills a run
    runs: list[dict[str, object]] = []
    random_ = random.Random(seed)
    while (left := kills - sum(len(run["kills"]) for run in runs)) > 0:
        run = folder / f"run{len(runs)}"
        run.mkdir()
        made = killed_run(run, steps, kind, left, random_, seconds)
        runs.append({"kills": made, "numbers_compared": compare(run, whole)})
        print(f"run {len(runs)}: {len(made)} kills, {runs[-1]['numbers_compared']} numbers equal", flush=True)
        shutil.rmtree(run)
    return runs


def main() -> None:
    """Kill, compare, and write the result file."""
    names = ["mqar", "text", "processes", "context"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_runs.json")
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # LightningCLI looks at them
    result = json.loads(args.out.read_text()) if args.out.exists() else {}  # of other kinds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        all_kinds = kinds(folder)
        for kind in args.kinds:
            began = time.monotonic()
            print(kind)
            runs = kill_runs(folder / kind, all_kinds[kind], args.kills, args.steps, args.seed)
            result[kind] = {
                "environment": describe(),
                "arguments": {"kills": args.kills, "seed": args.seed, "steps": args.steps},
                "options": [option.replace(name, "FOLDER") for option in all_kinds[kind].options],
                "kills": sum(len(run["kills"]) for run in runs),
                "numbers_compared": sum(run["numbers_compared"] for run in runs),
                "seconds": round(time.monotonic() - began, 1),
                "runs": runs,
            }
            print(f"{kind}: {result[kind]['kills']} kills, {result[kind]['numbers_compared']} numbers, all equal")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
