"""Starts a script as two processes that train together, with the variables that torchrun sets."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def start_two(script: Path, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Both processes of `python SCRIPT FOLDER`; what they say is in `log<rank>.txt` of the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(HERE), *sys.path])
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": paths}
        with (folder / f"log{rank}.txt").open("w") as log:
            command = [sys.executable, "-W", "ignore", str(script), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes
