"""Run a script as several processes, with the variables that torchrun sets.

    python together.py SCRIPT FOLDER PROCESSES

They are forked from a process that has imported the script, so that imports happen only once.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 240  # that all may take


@dataclass(frozen=True)
class End:
    """How a process has ended.

    Attributes:
        status: its exit status; negative for a signal.
        seconds: how long after the first process it ended.
    """

    status: int
    seconds: float


def run_together(script: Path, folder: Path, processes: int, check: bool = True) -> None:
    """Call `main(folder)` of a script in several processes, and wait for all of them to end.

    Args:
        script: a file outside of any package, in the same folder as the files that it imports.
        folder: folder for the output of the processes, in `log<rank>.txt`.
        processes: number of processes.
        check: whether to fail if one of them fails.
    """
    paths = os.pathsep.join([str(script.parent), *sys.path])
    command = [sys.executable, "-W", "ignore", __file__, str(script), str(folder), str(processes)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert first.wait(timeout=_SECONDS) == 0
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    if check:
        logs = [(folder / f"log{rank}.txt").read_text()[-2000:] for rank in range(processes)]
        assert not any(end.status for end in ends_of(folder)), "\n".join(logs)


def ends_of(folder: Path) -> list[End]:
    """How the processes that ran in a folder have ended, by rank."""
    return [End(*end) for end in json.loads((folder / "ends.json").read_text())]


def _main(script: Path, folder: Path, processes: int) -> None:
    main = importlib.import_module(script.stem).main
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    number = str(processes)
    os.environ |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started, ends = [_fork(main, folder, rank) for rank in range(processes)], {}
    while len(ends) < processes:
        process, status = os.wait()
        ends[process] = os.waitstatus_to_exitcode(status), time.monotonic()
    first = min(moment for _, moment in ends.values())
    told = [(ends[process][0], ends[process][1] - first) for process in started]
    (folder / "ends.json").write_text(json.dumps(told))


def _fork(main: object, folder: Path, rank: int) -> int:
    """Fork one process; its id."""
    if process := os.fork():
        return process
    status = 1
    try:
        log = os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        main(folder)
        status = 0
    except BaseException:  # SystemExit, too: nothing of the parent's must run here
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
