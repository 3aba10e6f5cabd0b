"""Trainings side by side: what is missing of a study is started, until all is done or a deadline comes.

Each cell has a folder with its run, the log of its commands, and what evaluations found. A run that was ended goes on
from its last checkpoint. A cell is recorded when all of its commands have ended well.
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

GRACE = 20.0  # seconds before the deadline in which runs are saved
_POLL = 0.1  # seconds
_RUN = Path("fit", "version_0")  # folder of the run in that of its cell
_SECONDS = "seconds.json"


@dataclass
class _Running:
    """A cell whose present command, the first, is being run; the others come behind it."""

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
        study: what to run.
        folder: of all cells.
        path: of the results.
        variables: values of `$name` in the study's flags.
        parallel: most trainings side by side.
        deadline: seconds after which all have ended.
        only: what the name of a cell must contain.

    Raises:
        ValueError: on a number that cannot be, a missing variable, or results that cannot be read.
    """

    study: Study
    folder: Path
    path: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    parallel: int = 8
    deadline: float = math.inf
    only: str = ""
    failed: dict[Cell, str] = field(init=False, default_factory=dict)
    """Cells of which a command has failed, and why."""

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
        self._resumed = False  # whether a cell had been begun by another call
        self._kill_at = math.inf  # on time.monotonic(), once runs were asked to end

    def run(self) -> bool:
        """Run what is missing; whether nothing is missing any more.

        Raises:
            ValueError: if another process runs in the folder, a variable is missing, or `only` is in no name.
        """
        begun = time.monotonic()
        if not any(self.only in str(cell) for cell in self.study.cells(self._value_of)):
            raise ValueError(f"only: expected text that the name of a cell contains, got {self.only!r}")
        for cell, options in self._missing().items():
            self._commands(cell, options)  # which may lack a variable
        share(self.folder / "compiled", self.parallel)
        with _locked(self.folder, self.path), _signals() as received, self._children():
            self.results = Results.read(self.path)  # now that nobody else writes to it
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
        """Cells without a record, of those that can be named by now."""
        return {
            cell: options
            for cell, options in self.study.cells(self._value_of).items()
            if self.only in str(cell) and self.results.of(cell, options, self.study.digest_of(cell)) is None
        }

    def _value_of(self, cell: Cell, options: Options) -> float | None:
        """The metric of a cell at its end; NaN if it failed, None if there is no record."""
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
        """Where a cell runs: another one if anything has changed, since a run cannot go on with other arguments."""
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
        """Go on with a cell if its present command has ended; end it if it had time enough to save."""
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
        """Ask all runs to save and to end."""
        self._kill_at = time.monotonic() + GRACE - 2 * _POLL
        for running in self._running:
            assert running.process is not None
            running.process.terminate()

    @contextmanager
    def _children(self) -> Iterator[None]:
        """Leave no process behind, whatever happens; what runs may save first."""
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
    """Be the only one that runs in a folder and writes to a file of results.

    Raises:
        ValueError: if another process does.
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
    """Signals that asked this process to end, as they come."""
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
    """Seconds of all commands of a cell so far, those of an attempt that was killed left out."""
    seconds += float(path.read_text()) if path.exists() else 0.0
    with atomic_write(path) as file:
        file.write(f"{seconds:.1f}".encode())
    return seconds


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")
