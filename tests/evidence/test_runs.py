"""The runner: trainings through the command line, killed and restarted."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import msgspec
import pytest
import torch
import yaml
from filelock import FileLock
from study_records import record

from benchmarks.evidence import runs
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.studies import read_study

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
OF_THE_MACHINE = ("seconds", "seconds_per_token", "bytes", "environment", "torch", "device")


def arguments(folder: Path, study: str, *args: str) -> list[str]:
    return ["run", study, "--parallel=2", f"--runs={folder / 'runs'}", f"--results={folder / 'results.json'}", *args]


def start(folder: Path, study: str, *args: str) -> subprocess.Popen:
    """Start the program in a process of its own, for tests that kill it."""
    command = [sys.executable, "-m", "benchmarks.evidence", *arguments(folder, study, *args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, **pipes)


def run(folder: Path, study: str, *args: str) -> tuple[int, str]:
    """Run the program in this process. After the first call, its fork server has already imported everything."""
    program = patch("sys.argv", ["evidence", *arguments(folder, study, *args)])
    with program, patch.dict(os.environ, ENVIRONMENT), contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            return main(), printed.getvalue()
        except SystemExit as told:
            return 1, str(told)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def without_machine(value: Any) -> Any:
    """A copy without what depends on the speed of the machine."""
    if isinstance(value, dict):
        return {name: without_machine(x) for name, x in value.items() if not name.endswith(OF_THE_MACHINE)}
    return [without_machine(x) for x in value] if isinstance(value, list) else value


def small_study(folder: Path, **options: object) -> str:
    """Write a study with two forms and one task."""
    study = {
        "base": "smoke",
        "options": options,
        "grids": [{"tasks": ["mqar"], "sizes": ["tiny"], "forms": ["mha", "dma"], "lr": [0.01], "seeds": [0]}],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(study))
    return str(folder / "small.yaml")


def processes_in(folder: Path) -> list[int]:
    """Ids of processes that have a file of the folder open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            names = [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(str(folder / "runs")) for name in names):
            found.append(int(process.name))
    return found


def test_smoke_killed_and_started_again_ends_with_the_same_results(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, printed = run(whole, "smoke")
    assert code == 0, printed
    once = results(whole)
    assert len(once["records"]) == printed.count("\nfinished  ")
    assert {x["task"] for x in once["records"]} >= {"mqar", "selective-copy", "induction", "needles", "text"}

    expected = [record for record in once["records"] if "needles" in record["task"]]
    assert len(expected) == 4
    process = start(killed, "smoke", "--only=needles")
    for line in process.stdout or ():
        if line.startswith("finished") and len(results(killed)["records"]) == 2:
            break
    process.kill()
    process.wait()
    done = results(killed)["records"]
    code, printed = run(killed, "smoke", "--only=needles")
    assert code == 0, printed
    assert printed.count("\nfinished  ") == len(expected) - len(done)
    assert without_machine(results(killed)["records"]) == without_machine(expected)

    for folder, more in ((whole, ()), (killed, ("--only=text-needles",))):  # nothing is left to do
        code, printed = run(folder, "smoke", *more)
        assert code == 0
        assert printed.startswith("0 finished")


def test_processes_end_with_a_killed_runner(tmp_path: Path) -> None:
    process = start(tmp_path, small_study(tmp_path, **{"trainer.max_steps": 100_000}))
    while len(list(tmp_path.rglob("last.ckpt"))) < 2:
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()
    assert len(processes_in(tmp_path)) >= 3
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while processes_in(tmp_path):
        time.sleep(0.1)
        assert time.monotonic() < end, processes_in(tmp_path)


def test_a_deadline_ends_runs_that_go_on_with_the_next_call(tmp_path: Path) -> None:
    steps = {"trainer.max_steps": 200, "trainer.val_check_interval": 100, "checkpoint.every_n_train_steps": 20}
    study = small_study(tmp_path, **steps)
    ended = threading.Event()

    def end() -> None:
        while not (ended.wait(0.1) or list(tmp_path.rglob("last.ckpt"))):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # the same as a deadline that has come

    begun, ending = time.monotonic(), threading.Thread(target=end)
    ending.start()
    try:
        code, printed = run(tmp_path, study, "--deadline=45", "--parallel=1")
    finally:
        ended.set()
        ending.join()
    assert time.monotonic() - begun < 45
    assert code == 1
    assert re.search(r"^ended     mqar tiny mha, lr 0.01, seed 0: goes on", printed, re.MULTILINE), printed
    assert "0 finished" in printed
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    step = checkpoint.resolve().stem
    code, printed = run(tmp_path, study, "--only=mha")
    assert code == 0, printed
    (log,) = tmp_path.rglob("log.txt")
    assert f"{step}.ckpt" in log.read_text()  # which it went on from
    (record,) = results(tmp_path)["records"]
    assert record["steps"] == 200


def test_a_cell_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    study = small_study(tmp_path, **{"data.num_pairs": 0})
    for _ in range(2):
        code, printed = run(tmp_path, study, "--only=dma")
        assert code == 1
        assert re.search(r"^failed    mqar tiny dma.*exit status 1.*num_pairs.*log.txt\)", printed, re.MULTILINE)
    assert not results(tmp_path)["records"]
    (failure,) = results(tmp_path)["failures"].items()
    assert failure[0].startswith("mqar tiny dma")
    assert "num_pairs" in failure[1]


def test_files_that_a_kill_has_cut_off_do_not_stop_others(tmp_path: Path) -> None:
    study = small_study(tmp_path, **{"trainer.max_steps": 2})
    code, _ = run(tmp_path, study, "--only=mha")
    assert code == 0
    content = results(tmp_path)
    content["records"] = []
    (tmp_path / "results.json").write_text(json.dumps(content))
    for file in tmp_path.rglob("events.out*"):
        file.unlink()
    code, printed = run(tmp_path, study)
    assert code == 1
    assert re.search(r"^failed    mqar tiny mha.*expected a metric of", printed, re.MULTILINE), printed
    assert re.search(r"^finished  mqar tiny dma", printed, re.MULTILINE), printed


def test_one_runner_at_a_time_writes_to_results(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    with FileLock(tmp_path / ".results.json.lock"):
        code, printed = run(tmp_path, study)
    assert code == 1
    assert "results.json: expected no other process to write there" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--parallel=0"], "expected parallel >= 1 and a deadline of more than 20 seconds"),
        (["--deadline=5"], "expected parallel >= 1 and a deadline of more than 20 seconds"),
        (["--set", "text"], "set: expected NAME=VALUE, got ['text']"),
        (["--only=mkar"], "only: expected text that the name of a cell contains, got 'mkar'"),
    ],
)
def test_wrong_arguments_are_told(tmp_path: Path, args: list[str], message: str) -> None:
    code, printed = run(tmp_path, "smoke", *args)
    assert code == 1
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_a_missing_variable_is_told_before_anything_runs(tmp_path: Path) -> None:
    code, printed = run(tmp_path, "first")
    assert code == 1
    assert "expected a value of $text, got none; give it by --set text=..." in printed
    assert not (tmp_path / "runs").exists()


def test_trainings_take_turns_on_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,MIG-3,7")  # of which there are two
    _, study = read_study(small_study(tmp_path))
    study = msgspec.structs.replace(study, grids=[msgspec.structs.replace(study.grids[0], seeds=[0, 1, 2])])
    begun: list[str | None] = []
    process = Mock(exitcode=None)

    def pretend(folder: Path, arguments: list[str], gpu: str | None) -> Mock:
        begun.append(gpu)
        process.exitcode = 1 if len(begun) >= 4 else None  # four are side by side, then all of them end
        return process

    monkeypatch.setattr(runs, "start_child", pretend)
    assert not runs.Runner(study, tmp_path / "runs", tmp_path / "results.json", parallel=4).run()
    assert begun == ["5", "MIG-3", "5", "MIG-3", "5", "MIG-3"]


def test_a_further_figure_that_is_not_logged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, study = read_study(small_study(tmp_path))
    task = msgspec.structs.replace(study.tasks["mqar"], also={"val/los": "lower"})
    monkeypatch.setattr(runs, "start_child", lambda *_: Mock(exitcode=0))
    monkeypatch.setattr(runs, "record_of", lambda *_: record("mha", 0, 0.5))
    runner = runs.Runner(
        msgspec.structs.replace(study, tasks=study.tasks | {"mqar": task}),
        tmp_path / "runs",
        tmp_path / "results.json",
        only="mha",
    )
    assert not runner.run()
    assert list(runner.failed.values()) == ["expected a metric of ['val/accuracy'], got 'val/los'"]
