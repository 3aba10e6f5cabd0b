"""Processes that run a script together."""

import os
import subprocess
import sys
from pathlib import Path


def run_together(script: Path, folder: Path, processes: int) -> None:
    """Run `script FOLDER RANK` in so many processes, and wait for their end; an error of one is one here."""
    paths = os.pathsep.join([str(script.parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs, started = [folder / f"{rank}.log" for rank in range(processes)], []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [sys.executable, "-W", "ignore", str(script), str(folder), str(rank)]
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    try:
        statuses = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(statuses), "\n".join(log.read_text()[-2000:] for log in logs)
