"""Speed of the data loader and of `dma-lightning prepare` on a CPU.

The text is 64 MiB of random words in documents of 50 to 5,000 bytes, as JSONL. The loader reads sequences of 4,096
bytes in random order, in batches of 8, from shards of 8 million tokens that are in the page cache. Before it is timed,
its first sequence is checked against the text, document borders included. `prepare` tokenizes a quarter of the text.
Each figure is the median [min - max] of 3 passes.
"""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dma_lightning import PreparedDataModule
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import IGNORE_INDEX
from harness import CommandLine, Part, Result, Row, Table, describe, record, spread
from harness.tables import interval

LENGTH, BATCH, TEXT_BYTES, REPEATS = 4096, 8, 64 << 20, 3


def write_text(folder: Path, size: int) -> None:
    """Documents of random words, as JSONL."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfw"))
    words = ["".join(random.choice(letters, random.integers(1, 11))) for _ in range(20_000)]
    left, part = size, 0
    while left > 0:
        with (folder / f"{part:02d}.jsonl").open("w") as file:
            for _ in range(2000):
                length = int(np.exp(random.uniform(np.log(50), np.log(5000))))
                text = " ".join(words[i] for i in random.zipf(1.2, length // 6 + 1) % len(words))[:length]
                file.write(json.dumps({"text": text}) + "\n")
                left -= len(text)
        part += 1


def rounded(rates: list[float]) -> list[int]:
    """Minimum, median and maximum, rounded to whole numbers."""
    return [round(rate) for rate in spread(rates)]


def check(data: PreparedDataModule) -> None:
    """Check that the first sequence is the beginning of the text, and that no label crosses a document border.

    Raises:
        RuntimeError: if this is not so.
    """
    item, shard = data.train_set[0], data.train_set.shards[0]
    tokens = shard.tokens[: LENGTH + 1].astype(np.int64)
    owner = np.searchsorted(shard.ends, np.arange(LENGTH + 1), side="right")
    labels = tokens[1:].copy()
    if data.separate_documents:
        labels[owner[1:] != owner[:-1]] = IGNORE_INDEX
    if not (np.array_equal(item["input_ids"], tokens[:-1]) and np.array_equal(item["labels"], labels)):
        raise RuntimeError("the loader returned different tokens than were written")


def loading(folder: Path) -> Iterator[Row]:
    """One row for each number of workers, with document borders and without."""
    for separate in (True, False):
        for workers in (0, 1, 2):
            data = PreparedDataModule(str(folder), LENGTH, separate, batch_size=BATCH, num_workers=workers)
            data.setup("fit")
            check(data)
            loader, rates = data.train_dataloader(), []
            for _ in range(REPEATS + 1):  # the first pass starts the workers and does not count
                start, tokens = time.perf_counter(), 0
                for batch in loader:
                    tokens += batch["input_ids"].numel()
                rates.append(tokens / (time.perf_counter() - start))
            yield {"separate_documents": separate, "workers": workers, "tokens_per_second": rounded(rates[1:])}


def train_tokenizer(text: Path, path: Path) -> None:
    """A byte-level BPE tokenizer of 8,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(text)], trainer)
    tokenizer.save(str(path))


def preparing(folder: Path) -> Iterator[Row]:
    """One row for each tokenizer and number of processes, on the first quarter of the text."""
    files = sorted((folder / "text").iterdir())
    part = folder / "part"
    part.mkdir()
    for file in files[: max(1, len(files) // 4)]:
        (part / file.name).symlink_to(file)
    train_tokenizer(files[0], folder / "tokenizer.json")
    for tokenizer in (None, str(folder / "tokenizer.json")):
        for processes in (1, 2):
            rates, output = [], folder / f"{tokenizer is None}-{processes}"
            for repeat in range(REPEATS):
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    prepare(str(part), output / str(repeat), tokenizer, processes=processes)
                manifest = json.loads((output / str(repeat) / "manifest.json").read_text())
                rates.append(manifest["bytes"] / (time.perf_counter() - start))
            kind = "bytes" if tokenizer is None else "BPE, 8000 tokens"
            yield {"tokenizer": kind, "processes": processes, "bytes_per_second": rounded(rates)}


def tables(result: Result) -> list[Part]:
    """What the pages show: the loader by workers, and `prepare` by processes."""

    def rates(name: str, unit: str, **wanted: object) -> list[str]:
        return [interval(row[unit], 1e6) for row in result[name] if wanted.items() <= row.items()]

    loaders = {"with document borders": True, "plain": False}
    return [
        Table(
            [[x, *rates("loading", "tokens_per_second", separate_documents=own)] for x, own in loaders.items()],
            "Speed of the loader on a CPU; higher is better:",
            ["million tokens per second", "in the training process", "1 worker", "2 workers"],
        ),
        Table(
            [[x, *rates("preparing", "bytes_per_second", tokenizer=x)] for x in ("bytes", "BPE, 8000 tokens")],
            "Speed of `prepare` on a CPU; higher is better:",
            ["`prepare`, million bytes per second", "1 process", "2 processes"],
        ),
    ]


def main() -> None:
    """Measure and write."""
    line = CommandLine(__doc__, "cpu_loader", duration="about five minutes on two cores")
    line.add_argument("--text_bytes", type=int, default=TEXT_BYTES, help="size of the text (default: 64 MiB)")
    args = line.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        write_text(folder / "text", args.text_bytes)
        prepare(str(folder / "text"), folder / "tokens", shard_tokens=8_000_000)
        result = describe() | {"text_bytes": args.text_bytes, "sequence_length": LENGTH, "batch_size": BATCH}
        record(args.out, result, {"loading": loading(folder / "tokens"), "preparing": preparing(folder)}, tables)


if __name__ == "__main__":
    main()
