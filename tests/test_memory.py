"""The memory of the `torch` backend grows linearly with the sequence."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cpu_attention.py"


def peak_mb(backend: str, length: int) -> float:
    """Peak memory of forward and backward in a separate process, beyond what it used before."""
    command = [sys.executable, str(SCRIPT), "--worker", backend, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return json.loads(done.stdout)["peak_mb"]


def test_memory_is_linear_in_the_length() -> None:
    one, four = (peak_mb("torch", length) for length in (4096, 16384))
    assert four < 5 * one  # quadratic memory would need 16 times as much


def test_the_measurement_sees_quadratic_memory() -> None:
    one, two = (peak_mb("reference", length) for length in (2048, 4096))
    assert two > 2.8 * one
