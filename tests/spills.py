"""How much memory a compiled kernel needs for registers that do not fit."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def stack_of(binary: bytes) -> int:
    """Bytes of local memory per thread of a kernel, which hold spilled registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(binary)
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(x) for x in re.findall(r"STACK:(\d+)", said))
