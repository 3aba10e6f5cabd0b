"""Processes that write to one place at once, or are killed, leave no partial or mixed file that looks complete."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from fuzz_contract import new_folder, place
from fuzz_prepared import source
from fuzz_told import told

from dma_lightning.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import TextDataModule

_REFUSED = 3  # exit status of a process that refuses to run and says why
_PATIENCE = 120  # seconds that a process may take


def check_killed_prepares(seed: int) -> None:
    """`prepare`, killed several times and then run once more, ends with the same bytes as an undisturbed run."""
    rng = random.Random(seed)
    expected, seconds = _undisturbed()
    moments = [rng.uniform(0, 1.2 * seconds) for _ in range(rng.randint(1, 4))]
    with told(seed, f"killed after {[round(x, 3) for x in moments]} s"), new_folder() as root:
        for moment in moments:
            _kill(_start(_prepare, root / "out"), moment)
        assert _ended(_start(_prepare, root / "out")) == 0, "it does not continue"
        assert _hashes(root / "out") == expected, "other bytes"


def check_two_prepares(seed: int) -> None:
    """Two runs of `prepare` in one folder, one of which may be killed.

    If one succeeds, the folder is complete. After a third run, it is complete in any case.
    """
    rng = random.Random(seed)
    expected, seconds = _undisturbed()
    delay, killed, moment = rng.uniform(0, 1.2 * seconds), rng.choice((None, 0, 1)), rng.uniform(0, 1.2 * seconds)
    with told(seed, f"the second after {delay:.3f} s, {killed} is killed after {moment:.3f} s"), new_folder() as root:
        processes = [_start(_prepare, root / "out")]
        time.sleep(delay)
        processes.append(_start(_prepare, root / "out"))
        if killed is not None:
            _kill(processes[killed], moment)
        ends = [_ended(process) for number, process in enumerate(processes) if number != killed]
        assert set(ends) <= {0, _REFUSED}, f"exit status {ends}"
        if 0 in ends:
            assert _hashes(root / "out") == expected, "one succeeded, but left other bytes"
        assert _ended(_start(_prepare, root / "out")) == 0, "the third does not continue"
        assert _hashes(root / "out") == expected, "the third left other bytes"


def check_two_caches(seed: int) -> None:
    """Two runs write the same text cache, and one may be killed: the cache is complete or missing."""
    rng, expected = random.Random(seed), _cached()
    delay, killed, moment = rng.uniform(0, 0.02), rng.choice((None, 0, 1)), rng.uniform(0, 0.05)
    with told(seed, f"the second after {delay:.3f} s, {killed} is killed after {moment:.3f} s"), new_folder() as root:
        processes = [_start(_write_cache, root)]
        time.sleep(delay)
        processes.append(_start(_write_cache, root))
        if killed is not None:
            _kill(processes[killed], moment)
        ends = [_ended(process) for number, process in enumerate(processes) if number != killed]
        assert set(ends) <= {0, _REFUSED}, f"exit status {ends}"
        for file in root.rglob("*.bin"):
            assert file.read_bytes() == expected, "an incomplete cache"
        _write_cache(root)
        assert [file.read_bytes() for file in root.rglob("*.bin")] == [expected], "other bytes"


def check_killed_saves(seed: int) -> None:
    """A kill while one checkpoint replaces another leaves one of them intact."""
    rng = random.Random(seed)
    moment = rng.uniform(0, 0.1)
    with told(seed, f"killed after {moment:.4f} s"), new_folder() as root:
        path = root / "last.ckpt"
        _save(path, 0)
        _kill(_start(_save_on, path), moment)
        found = read_checkpoint(path)
        assert (found["weights"] == found["number"]).all(), "a mixed checkpoint"


def check_races(seed: int) -> None:
    """One of the checks above."""
    checks = (check_killed_saves, check_two_caches, check_two_prepares, check_killed_prepares)
    checks[seed % len(checks)](seed)


@cache
def _long_text() -> Path:
    file = place().root / "long.jsonl"
    texts = (f"document {i} of {i % 7} things, and what is said of them; " * (1 + i % 9) for i in range(400))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source()  # makes the tokenizer too
    return file


def _prepare(output: Path) -> None:
    prepare(str(_long_text()), output, str(source() / "tokenizer.json"), shard_tokens=2000, processes=1)


@cache
def _undisturbed() -> tuple[dict[str, str], float]:
    """Hashes of the files of an undisturbed run, and the seconds that it took."""
    output = place().root / "undisturbed"
    _long_text()
    begin = time.monotonic()
    assert _ended(_start(_prepare, output)) == 0
    return _hashes(output), time.monotonic() - begin


def _hashes(folder: Path) -> dict[str, str]:
    """Hashes of all files except locks, including unfinished files."""
    files = (file for file in sorted(folder.iterdir()) if not file.name.startswith(".lock"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _text(folder: Path) -> TextDataModule:
    path, tokenizer = str(source() / "plain.txt"), str(source() / "tokenizer.json")
    return TextDataModule(path, 16, 0.2, batch_size=2, cache_dir=str(folder / "cache"), tokenizer=tokenizer)


def _write_cache(folder: Path) -> None:
    _text(folder).prepare_data()


@cache
def _cached() -> bytes:
    """The cache of an undisturbed run."""
    with new_folder() as root:
        _write_cache(root)
        (file,) = root.rglob("*.bin")
        return file.read_bytes()


def _save(path: Path, number: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"number": number, "weights": torch.full((100_000,), number)}, path)


def _save_on(path: Path) -> None:
    for number in range(1, 1000):
        _save(path, number)


def _start(function: Callable[[Path], None], path: Path) -> BaseProcess:
    """Start a process that inherits everything imported so far."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(function, path))
    process.start()
    return process


def _run(function: Callable[[Path], None], path: Path) -> None:
    torch.set_num_threads(1)  # other threads do not survive a fork
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function(path)
    except (ValueError, OSError) as error:
        os._exit(_REFUSED if str(path) in str(error) else 1)
    os._exit(0)


def _kill(process: BaseProcess, moment: float) -> None:
    process.join(moment)
    process.kill()
    process.join()


def _ended(process: BaseProcess) -> int:
    """Exit status."""
    process.join(_PATIENCE)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"a process has not ended after {_PATIENCE} s")
    return process.exitcode
