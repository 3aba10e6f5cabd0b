"""Build the wheel, install it outside of the clone, and use it there as somebody would who has no clone.

    make test-wheel

The new environment contains only the wheel, and sees the packages of the Python that runs this script as dependencies.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FEW = ["--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "2", "--trainer.num_sanity_val_steps", "0"]
CHECKPOINT = "runs/cpu/version_0/checkpoints/last.ckpt"

# Arguments of dma-lightning, the exit status, and what is said.
COMMANDS: list[tuple[list[str], int, str]] = [
    (["fit"], 2, "`dma-lightning fit -c tiny -c pydoc -c cpu`"),
    (["fit", "-c", "tinny"], 2, "did you mean 'model/tiny'?"),
    (["init", "first"], 0, "dma-lightning fit -c first/config.yaml"),
    (["fit", "-c", "first/config.yaml", *FEW, "--trainer.max_steps", "2"], 0, "runs/first/version_0/checkpoints"),
    (["fit", "-c", "tiny", "-c", "data/pydoc", "-c", "trainer/cpu", *FEW, "--trainer.max_steps", "3"], 0, CHECKPOINT),
    (
        ["fit", "-c", "tiny", "-c", "pydoc", "-c", "cpu", *FEW, "--trainer.max_steps", "5", "--ckpt_path", "last"],
        0,
        "runs/cpu/version_0/checkpoints/step=3.ckpt",
    ),
    (["validate", "--ckpt_path", CHECKPOINT, "--trainer.limit_val_batches", "2"], 0, "val/bits_per_byte"),
    (["generate", "--ckpt_path", CHECKPOINT, "--prompt", "The ", "--max_new_tokens", "8"], 0, "The "),
    (["export-hf", CHECKPOINT, "exported"], 0, "written to exported"),
    (["import-hf", "exported", "imported"], 0, "written to imported/model.ckpt"),
    (["sizes", "80m"], 0, "| `80m`, 4,096 tokens |"),
]


def run(*command: str | Path, folder: Path, status: int = 0) -> str:
    """Run a command without access to the clone, and check its exit status; what it prints."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"}
    done = subprocess.run([*command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != status:
        sys.exit(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def install(folder: Path) -> Path:
    """Build the wheel and install it into a new environment; the environment's folder of programs."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB")
    builder = venv.EnvBuilder()
    builder.create(folder / "env")
    python = folder / "env/bin/python"
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but .pth files in it, such as that of the clone, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, folder=folder)
    where = run(python, "-c", "import dma_lightning; print(dma_lightning.__file__)", folder=folder).strip()
    if not Path(where).is_relative_to(site):
        sys.exit(f"dma_lightning: expected the installed wheel, got {where}")
    check = subprocess.run([*pip, "--python", python, "check"], cwd=folder, capture_output=True, text=True)
    if missing := [line for line in check.stdout.splitlines() if line.startswith("dma-lightning ")]:
        sys.exit("\n".join(missing))
    print(f"installed: {where}; it needs nothing that was not there")
    return python.parent


def main() -> None:
    """Build, install and use the wheel. The first thing that is wrong ends this script with status 1."""
    with tempfile.TemporaryDirectory(prefix="dma-wheel-") as place:
        folder = Path(place)
        programs = install(folder)
        for arguments, status, said in COMMANDS:
            started = time.monotonic()
            printed = run(programs / "dma-lightning", *arguments, folder=folder, status=status)
            if said not in printed:
                sys.exit(f"dma-lightning {' '.join(arguments)}: expected {said!r} in what it prints, got\n{printed}")
            print(f"{time.monotonic() - started:5.1f} s  dma-lightning {' '.join(arguments)}")
    print("the wheel works without a clone")


if __name__ == "__main__":
    main()
