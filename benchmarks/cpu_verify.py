"""How fast files are verified when they are read, on a CPU: prepared shards, a checkpoint, and an export.

Each kind holds about 512 MB, in the page cache: four shards of random digits (SHA-256, before a run), a checkpoint (the
CRC-32 of each record, once per process), and an export with its `SHA256SUMS`. Before it is timed, each check must find
a flipped bit. Figures are bytes per second of processor time, added up over threads, so other work on the machine does
not change them; median [min - max] of 5.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from dma_lightning import PreparedDataModule
from dma_lightning.cli.prepare import prepare
from dma_lightning.files.sha256_sums import check_sums, write_sums
from dma_lightning.files.zip_checksums import check_records
from harness import CommandLine, Result, Row, describe, record, spread

PARTS, PART_BYTES, REPEATS = 4, 128 << 20, 5

Check = Callable[[], None]


def write_shards(folder: Path) -> tuple[Path, Check]:
    """Write shards of random digits; one of their files, and the function that verifies them."""
    (folder / "text").mkdir()
    for number in range(PARTS):
        (folder / f"text/{number}.txt").write_text(os.urandom(PART_BYTES // 2).hex())
    prepare(str(folder / "text"), folder / "tokens", shard_tokens=1)
    return folder / "tokens/shard-00002.tokens", lambda: PreparedDataModule(str(folder / "tokens")).prepare_data()


def write_checkpoint(folder: Path) -> tuple[Path, Check]:
    """Write a file with `torch.save`; the file, and the function that verifies it."""
    file = folder / "model.ckpt"
    torch.save({"state_dict": weights()}, file)
    return file, lambda: check_records(file)


def write_export(folder: Path) -> tuple[Path, Check]:
    """Write a folder with weights and hashes; the file of weights, and the function that verifies them."""
    (folder / "export").mkdir()
    save_file(weights(), folder / "export/model.safetensors")
    write_sums(folder / "export")
    return folder / "export/model.safetensors", lambda: check_sums(folder / "export")


def weights() -> dict[str, torch.Tensor]:
    """Random weights."""
    return {f"{number}": torch.randn(PART_BYTES // 4) for number in range(PARTS)}


KINDS = {"prepared shards": write_shards, "checkpoint": write_checkpoint, "export": write_export}


def flip(file: Path) -> None:
    """Flip the lowest bit of the byte a third of the way into the file, which is inside a record."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 3)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def finds_damage(file: Path, check: Check) -> bool:
    """Whether the check finds a flipped bit. The bit is flipped back afterwards."""
    flip(file)
    try:
        check()
    except ValueError:
        return True
    finally:
        flip(file)
    return False


def rates(file: Path, check: Check) -> list[int]:
    """Bytes per second of processor time."""
    found = []
    for turn in range(REPEATS):
        os.utime(file, (turn, turn))  # a new time stamp, so that the process verifies the file again
        start = time.process_time()
        check()
        found.append(PARTS * PART_BYTES / (time.process_time() - start))
    return [round(rate) for rate in spread(found)]


def measure() -> Iterator[Row]:
    """One row for each kind of file."""
    for kind, write in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            file, check = write(Path(folder))
            if not finds_damage(file, check):
                raise RuntimeError(f"{kind}: a flipped bit was not found")
            yield {"kind": kind, "bytes": PARTS * PART_BYTES, "bytes_per_second": rates(file, check)}


def sentence(result: Result, kind: str) -> str:
    """The text that the docs show for a kind of file."""
    row = next(row for row in result["checking"] if row["kind"] == kind)
    least, median, greatest = (f"{rate / 1e9:.3g}" for rate in row["bytes_per_second"])
    return f"{median} [{least} - {greatest}] GB per second and core"


def main() -> None:
    """Measure and write."""
    args = CommandLine(__doc__, "cpu_verify", duration="about two minutes on two cores").parse_args()
    record(args.out, describe(), {"checking": measure()})


if __name__ == "__main__":
    main()
