"""How fast a run checks the hashes of its prepared shards before it begins, on a CPU.

    python benchmarks/cpu_verify.py      a JSON file under benchmarks/results/

The shards: four of 128 MB, of random digits, in the page cache; a damaged one is found first. Bytes per second of
processor time, which threads divide among cores and other work does not change. Median [min - max] of 5 passes.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu_loader import spread
from environment import describe, write_tables

from dma_lightning import PreparedDataModule
from dma_lightning.prepare_command import prepare

SHARDS, SHARD_BYTES, REPEATS = 4, 128 << 20, 5


def write_shards(folder: Path) -> None:
    """Random digits, one file a shard."""
    (folder / "text").mkdir()
    for number in range(SHARDS):
        (folder / f"text/{number}.txt").write_text(os.urandom(SHARD_BYTES // 2).hex())
    prepare(str(folder / "text"), folder / "tokens", shard_tokens=1)


def flip(file: Path) -> None:
    """The lowest bit of the first byte."""
    with file.open("r+b") as stream:
        (first,) = stream.read(1)
        stream.seek(0)
        stream.write(bytes([first ^ 1]))


def check(folder: Path) -> None:
    """That a flipped bit is found.

    Raises:
        RuntimeError: if it is not.
    """
    flip(folder / "shard-00002.tokens")
    try:
        PreparedDataModule(str(folder)).prepare_data()
    except ValueError:
        flip(folder / "shard-00002.tokens")
        return
    raise RuntimeError("a damaged shard was not found")


def rates(folder: Path, size: int) -> list[int]:
    """Bytes per second of processor time."""
    found = []
    for _ in range(REPEATS):
        data, start = PreparedDataModule(str(folder)), time.process_time()
        data.prepare_data()
        found.append(size / (time.process_time() - start))
    return spread(found)


def sentence(result: dict[str, Any]) -> str:
    """What docs/data.md says."""
    least, median, greatest = (f"{rate / 1e9:.3g}" for rate in result["checking"][0]["bytes_per_second"])
    return f"{median} [{least} - {greatest}] GB per second and core"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cpu_verify.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tokens"
        write_shards(Path(name))
        check(folder)
        size = json.loads((folder / "manifest.json").read_text())["tokens"]
        row = {"shards": SHARDS, "bytes": size, "bytes_per_second": rates(folder, size)}
        write_tables(args.out, describe(), {"checking": [row]})


if __name__ == "__main__":
    main()
