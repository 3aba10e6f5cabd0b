"""What every result file says about its run: the machine, the versions and the commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def describe() -> dict[str, str | int]:
    """Hardware, versions and commit."""
    git = ["git", "-C", str(ROOT)]
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


def _gpu() -> dict[str, str]:
    """Name of the GPU, and versions of Triton, cuDNN and CUDA; empty if there is no GPU."""
    if not torch.cuda.is_available():
        return {}
    versions = {"triton": version("triton"), "cudnn": str(torch.backends.cudnn.version())}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **versions}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
