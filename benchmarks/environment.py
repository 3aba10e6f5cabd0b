"""What every result file says about the machine, the versions and the commit it was measured with; writing them."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, str | int]:
    """Hardware, versions and commit."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    code = ["--", ".", ":!benchmarks/results"]
    changed = subprocess.run([*git, "status", "--porcelain", *code], capture_output=True, text=True, check=False)
    return {
        "cpu": _cpu_name(),
        **_gpu(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
        "commit": (commit.stdout.strip() or "unknown") + ("+changes" if changed.stdout else ""),
    }


def write_tables(path: Path, result: dict[str, Any], tables: dict[str, Iterable[dict[str, Any]]]) -> None:
    """Measure and print the rows of all tables, and write the file after each, so that an interruption loses one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        result[name] = []
        for row in rows:
            result[name].append(row)
            print(name, row, flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def _gpu() -> dict[str, str]:
    """Name of the GPU and versions of what drives it; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    versions = {"triton": version("triton"), "cudnn": str(torch.backends.cudnn.version())}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **versions}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
