"""How fast the content of files is checked when they are read, on a CPU: prepared shards, a checkpoint, an export.

Each kind has about 512 MB, in the page cache: four shards of random digits (SHA-256, before a run), a checkpoint (the
CRC-32 of each record, once per process) and an export with its `SHA256SUMS`. A flipped bit is found first. Bytes per
second of processor time, which threads divide among cores and other work does not change. Median [min - max] of 5.
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
    """Shards of random digits; a file of theirs, and what checks them."""
    (folder / "text").mkdir()
    for number in range(PARTS):
        (folder / f"text/{number}.txt").write_text(os.urandom(PART_BYTES // 2).hex())
    prepare(str(folder / "text"), folder / "tokens", shard_tokens=1)
    return folder / "tokens/shard-00002.tokens", lambda: PreparedDataModule(str(folder / "tokens")).prepare_data()


def write_checkpoint(folder: Path) -> tuple[Path, Check]:
    """A file of `torch.save`, and what checks it."""
    file = folder / "model.ckpt"
    torch.save({"state_dict": weights()}, file)
    return file, lambda: check_records(file)


def write_export(folder: Path) -> tuple[Path, Check]:
    """A folder with weights and hashes; the file of weights, and what checks them."""
    (folder / "export").mkdir()
    save_file(weights(), folder / "export/model.safetensors")
    write_sums(folder / "export")
    return folder / "export/model.safetensors", lambda: check_sums(folder / "export")


def weights() -> dict[str, torch.Tensor]:
    """Random weights."""
    return {f"{number}": torch.randn(PART_BYTES // 4) for number in range(PARTS)}


KINDS = {"prepared shards": write_shards, "checkpoint": write_checkpoint, "export": write_export}


def flip(file: Path) -> None:
    """The lowest bit of the byte behind a third of the file, which is within a record."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 3)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def finds_damage(file: Path, check: Check) -> bool:
    """Whether a flipped bit is found; it is flipped back."""
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
        os.utime(file, (turn, turn))  # another content for all that a process knows
        start = time.process_time()
        check()
        found.append(PARTS * PART_BYTES / (time.process_time() - start))
    return [round(rate) for rate in spread(found)]


def measure() -> Iterator[Row]:
    """One row by kind."""
    for kind, write in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            file, check = write(Path(folder))
            if not finds_damage(file, check):
                raise RuntimeError(f"{kind}: a flipped bit was not found")
            yield {"kind": kind, "bytes": PARTS * PART_BYTES, "bytes_per_second": rates(file, check)}


def sentence(result: Result, kind: str) -> str:
    """What the documents say about a kind."""
    row = next(row for row in result["checking"] if row["kind"] == kind)
    least, median, greatest = (f"{rate / 1e9:.3g}" for rate in row["bytes_per_second"])
    return f"{median} [{least} - {greatest}] GB per second and core"


def main() -> None:
    """Measure and write."""
    args = CommandLine(__doc__, "cpu_verify", duration="about two minutes on two cores").parse_args()
    record(args.out, describe(), {"checking": measure()})


if __name__ == "__main__":
    main()
