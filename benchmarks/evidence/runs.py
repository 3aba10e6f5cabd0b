"""Run the missing trainings of a study side by side, until all are done or a deadline comes.

Each cell has a folder with its run, the log of its commands, and the results of its evaluations. A run that was
interrupted continues from its last checkpoint. A cell is recorded when all of its commands have succeeded.
"""

import hashlib
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from benchmarks.evidence.child import LOG, share, start_child, visible_gpus
from benchmarks.evidence.figures import record_of
from benchmarks.evidence.results import Invocation, Results
from benchmarks.evidence.studies import Cell, Options, Study, filled
from benchmarks.harness.environment import describe
from dma_lightning.files.atomic import atomic_write
from dma_lightning.files.locks import locked_folder

GRACE = 20.0  # seconds before the deadline, for runs to save
_POLL = 0.1  # seconds
_RUN = Path("fit", "version_0")  # folder of the run, below the folder of its cell
_SECONDS = "seconds.json"


@dataclass
class _Running:
    """A cell whose first command is running. The remaining commands follow it."""

    cell: Cell
    options: Options
    folder: Path
    commands: list[list[str]]
    gpu: str | None
    process: ForkServerProcess | None = None
    started: float = 0.0


@dataclass
class Runner:
    """Runs a study.

    Attributes:
        study: the study to run.
        folder: folder of all cells.
        path: of the results.
        variables: values of `$name` in the study's flags.
        parallel: the largest number of trainings at once.
        deadline: seconds after which all trainings have stopped.
        only: text that the name of a cell must contain.

    Raises:
        ValueError: if `parallel` or `deadline` is too small, or the results cannot be read.
    """

    study: Study
    folder: Path
    path: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    parallel: int = 8
    deadline: float = math.inf
    only: str = ""
    failed: dict[Cell, str] = field(init=False, default_factory=dict)
    """Cells with a failed command, and why it failed."""

    def __post_init__(self) -> None:
        if self.parallel < 1 or self.deadline <= GRACE:
            raise ValueError(
                f"expected parallel >= 1 and a deadline of more than {GRACE:g} seconds, in which runs are saved; got "
                f"{self.parallel} and {self.deadline:g}"
            )
        self.results = Results.read(self.path)
        self._gpus = visible_gpus()
        self._running: list[_Running] = []
        self._finished: list[str] = []
        self._resumed = False  # whether an earlier call had already started one of the cells
        self._kill_at = math.inf  # by time.monotonic(); finite once runs have been asked to stop

    def run(self) -> bool:
        """Run the missing cells. Returns whether none is missing afterwards.

        Raises:
            ValueError: if another process runs in the folder, a variable is missing, or no cell's name contains `only`.
        """
        begun = time.monotonic()
        if not any(self.only in str(cell) for cell in self.study.cells(self._value_of)):
            raise ValueError(f"only: expected text that the name of a cell contains, got {self.only!r}")
        for cell, options in self._missing().items():
            self._commands(cell, options)  # raises if a variable is missing
        share(self.folder / "compiled", self.parallel)
        with _locked(self.folder, self.path), _signals() as received, self._children():
            self.results = Results.read(self.path)  # again, now that nobody else writes to it
            while True:
                if not self._is_ending and (received or time.monotonic() > begun + self.deadline - GRACE):
                    self._end()
                self._start()
                if not self._running:
                    break
                time.sleep(_POLL)
                for running in self._running[:]:
                    self._look_at(running)
            seconds = time.monotonic() - begun
            if self._finished:
                whole = not self._is_ending and not self._resumed and not self.failed
                self.results.invocations.append(
                    Invocation(self.parallel, round(seconds, 1), self._finished, whole, describe(), len(self._gpus))
                )
                self.results.write(self.path)
        missing, rate = len(self._missing()), 3600 * len(self._finished) / seconds
        print(f"{len(self._finished)} finished in {seconds:.0f} s ({rate:.0f} an hour), {missing} missing: {self.path}")
        return not missing

    @property
    def _is_ending(self) -> bool:
        return self._kill_at < math.inf

    def _missing(self) -> dict[Cell, Options]:
        """Those of the cells known so far that have no record."""
        return {
            cell: options
            for cell, options in self.study.cells(self._value_of).items()
            if self.only in str(cell) and self.results.of(cell, options, self.study.digest_of(cell)) is None
        }

    def _value_of(self, cell: Cell, options: Options) -> float | None:
        """The final metric of a cell. NaN if the cell failed, None if there is no record."""
        return math.nan if cell in self.failed else self.results.value_of(self.study, cell, options)

    def _start(self) -> None:
        """Start cells while there is room."""
        taken = {running.cell for running in self._running} | self.failed.keys()
        for cell, options in self._missing().items():
            if self._is_ending or len(self._running) >= self.parallel:
                return
            if cell not in taken:
                folder, commands = self._folder(cell, options), self._commands(cell, options)
                running = _Running(cell, options, folder, commands, self._free_gpu())
                self._resumed |= running.folder.exists()
                running.folder.mkdir(parents=True, exist_ok=True)
                self._running.append(running)
                self._begin_command(running)
                print(f"started   {cell}", flush=True)

    def _free_gpu(self) -> str | None:
        """The GPU with the fewest trainings; None if there is none."""
        taken = Counter(running.gpu for running in self._running)
        return min(self._gpus, key=taken.__getitem__, default=None)

    def _folder(self, cell: Cell, options: Options) -> Path:
        """Where a cell runs. If anything about it changes, so does the folder: no run continues with new arguments."""
        arguments = self.study.fit_arguments(cell, options, self.variables)
        looks = self.study.tasks[cell.task].evaluations
        said = json.dumps([arguments, looks, self.study.digest_of(cell)], sort_keys=True)
        return self.folder / cell.folder / hashlib.sha256(said.encode()).hexdigest()[:8]

    def _commands(self, cell: Cell, options: Options) -> list[list[str]]:
        """Arguments of `dma-lightning`, for training and each evaluation."""
        folder = self._folder(cell, options)
        logger = [
            "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger", f"--trainer.logger.save_dir={folder}",
            f"--trainer.logger.name={_RUN.parent}", "--trainer.logger.version=0",
            "--trainer.logger.default_hp_metric=false",
        ]  # fmt: skip
        commands = [[*self.study.fit_arguments(cell, options, self.variables), *logger, "--ckpt_path=last"]]
        checkpoint = str(folder / _RUN / "checkpoints" / "last.ckpt")
        for name, more in self.study.tasks[cell.task].evaluations.items():
            output = folder / f"{name}.json"
            if not output.exists():
                commands.append(
                    [name, checkpoint, *(filled(text, self.variables) for text in more), f"--output={output}"]
                )
        return commands

    def _begin_command(self, running: _Running) -> None:
        running.started = time.monotonic()
        running.process = start_child(running.folder, running.commands[0], running.gpu)

    def _look_at(self, running: _Running) -> None:
        """Move on to the next command if the current one has ended. Kill it if its time to save is over."""
        process, now = running.process, time.monotonic()
        assert process is not None
        if now > self._kill_at:
            process.kill()
        if process.exitcode is None:
            return
        process.join()
        seconds = _add_seconds(running.folder / _SECONDS, now - running.started)
        if process.exitcode == 0 and len(running.commands) > 1 and not self._is_ending:
            del running.commands[0]
            self._begin_command(running)
            return
        self._running.remove(running)
        if process.exitcode == 0 and len(running.commands) == 1:
            self._record(running, seconds)
        elif self._is_ending:
            print(f"ended     {running.cell}: goes on when the study is run again", flush=True)
        else:
            self._fail(running, f"exit status {process.exitcode}: {_last_line(running.folder / LOG)}")

    def _record(self, running: _Running, seconds: float) -> None:
        cell, task, digest = running.cell, self.study.tasks[running.cell.task], self.study.digest_of(running.cell)
        try:
            found = {name: json.loads((running.folder / f"{name}.json").read_bytes()) for name in task.evaluations}
            record = record_of(cell, running.options, digest, running.folder / _RUN, seconds, found)
        except (ValueError, OSError, KeyError) as error:
            self._fail(running, f"{error!r}; delete {running.folder} to train it again")
            return
        if unknown := [metric for metric in task.metrics if metric not in record.curves]:
            known = [name for name in record.curves if name.startswith("val/")]
            self._fail(running, f"expected a metric of {known}, got {unknown[0]!r}")
            return
        self.results.failures.pop(str(cell), None)
        self.results.records.append(record)
        self.results.write(self.path)
        self._finished.append(str(cell))
        print(
            f"finished  {cell}: {task.metric} {record.final(task.metric):.4f} after {record.tokens:,} tokens, "
            f"{seconds:.0f} s; {len(self._missing())} missing",
            flush=True,
        )

    def _fail(self, running: _Running, reason: str) -> None:
        self.failed[running.cell] = reason
        self.results.failures[str(running.cell)] = reason.replace(str(running.folder), "its folder")
        self.results.write(self.path)
        print(f"failed    {running.cell}: {reason} ({running.folder / LOG})", flush=True)

    def _end(self) -> None:
        """Ask all runs to save and stop."""
        self._kill_at = time.monotonic() + GRACE - 2 * _POLL
        for running in self._running:
            assert running.process is not None
            running.process.terminate()

    @contextmanager
    def _children(self) -> Iterator[None]:
        """Leave no process behind, whatever happens. Runs get time to save first."""
        try:
            yield
        finally:
            processes = [running.process for running in self._running if running.process is not None]
            for process in processes:
                process.terminate()
            end = time.monotonic() + GRACE
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
                process.kill()
                process.join()


@contextmanager
def _locked(folder: Path, results: Path) -> Iterator[None]:
    """Keep other processes from running in a folder and from writing to a file of results.

    Raises:
        ValueError: if another process already does either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(results.with_name(f".{results.name}.lock"), timeout=0)
    with locked_folder(folder, "wait for its end"):
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"{results}: expected no other process to write there, got one; wait for its end"
            ) from error
        with lock:
            yield


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that collects the signals asking this process to end, as they arrive."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _add_seconds(path: Path, seconds: float) -> float:
    """Add to the seconds of a cell's commands; the sum so far. It lacks attempts in which the runner was killed."""
    seconds += float(path.read_text()) if path.exists() else 0.0
    with atomic_write(path) as file:
        file.write(f"{seconds:.1f}".encode())
    return seconds


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")
