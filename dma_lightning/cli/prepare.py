"""`dma-lightning prepare`: tokenizes text once and writes shards of tokens."""

import hashlib
import itertools
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dma_lightning.data.find_files import size_and_time, text_files, user_path
from dma_lightning.data.manifests import (
    MANIFEST,
    PLAN,
    TOKENIZER,
    VERSION,
    Manifest,
    Plan,
    ShardRecord,
    read_plan,
    read_records,
    token_type,
)
from dma_lightning.data.shards import ShardWriter, write_json, write_text
from dma_lightning.data.text_formats import Piece, check_separator, read_documents
from dma_lightning.files.locks import HOLDER, LOCK, locked_folder
from dma_lightning.tokenizers import ByteTokenizer, DataTokenizer, FileTokenizer, SpecialTokens

_TASK_BYTES = 1 << 20  # text that a process tokenizes at once
_TASKS_AHEAD = 3  # for each process

_SHARD_FILE = re.compile(r"(shard-[0-9]{5,})\.(tokens|ends\.npy|lengths|json)(\.tmp)?")

_Place = tuple[int, int]  # number of a file, number of its lines, rows or separated documents that are done


@dataclass(frozen=True)
class _Encoded:
    """Tokens of pieces of text, in few arrays, because sending many is slow.

    Attributes:
        tokens: tokens of all pieces.
        counts: number of tokens in each piece.
        lengths: number of bytes that each token stands for; None if tokens are bytes.
    """

    tokens: np.ndarray
    counts: list[int]
    lengths: np.ndarray | None

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Tokens and lengths of each piece."""
        for start, count in zip(itertools.accumulate(self.counts, initial=0), self.counts, strict=False):
            part = slice(start, start + count)
            yield self.tokens[part], None if self.lengths is None else self.lengths[part]


def prepare(
    path: str,
    output: Path,
    tokenizer: str | None = None,
    special_tokens: SpecialTokens = "text",
    text_field: str = "text",
    separator: str | None = None,
    eos_token_id: int | None = None,
    shard_tokens: int = 100_000_000,
    processes: int | None = None,
) -> None:
    """Tokenize text into memory-mapped shards with document boundaries, for `PreparedDataModule`.

    You may interrupt it at any time; the same command checks the finished shards and continues after the last one.
    Until you run it again, you may change input files that come after the last finished shard. The output does not
    depend on the number of processes.

    Args:
        path: a file, a folder (all files below it that are not hidden) or a glob. A document is a line of a .jsonl or
            .ndjson file, or a row of a .parquet file or of a folder that Dataset.save_to_disk wrote. Any other file is
            one document, or several with a separator. Text and JSONL may be .gz or .zst.
        output: folder to write to: a new one, or one of the same command.
        tokenizer: a tokenizer.json of the tokenizers library; it is copied to the folder. Default: tokens are bytes.
        special_tokens: whether the name of a special token in the text stays text (text) or becomes that token (parse).
        text_field: the field of a JSONL line, or the column, that holds the text.
        separator: text that stands between the documents of a plain text file and belongs to none of them. Default:
            each plain text file is one document.
        eos_token_id: token to add after each document. Default: none.
        shard_tokens: a shard ends with the document that reaches this number of tokens.
        processes: number of processes that tokenize. Default: one per core.

    Raises:
        ValueError: if a file or line has another format, output holds other files, or another process writes there.
    """
    reader = ByteTokenizer() if tokenizer is None else FileTokenizer(tokenizer, special_tokens)
    processes = _usable_cores() if processes is None else processes
    if min(shard_tokens, processes) < 1:
        raise ValueError(f"expected shard_tokens and processes of at least 1, got {shard_tokens} and {processes}")
    if eos_token_id is not None and not 0 <= eos_token_id < reader.vocab_size:
        raise ValueError(f"eos_token_id: expected one of the {reader.vocab_size} tokens, got {eos_token_id}")
    output = user_path(output)
    if output.resolve().is_relative_to(source := user_path(path).resolve()):
        raise ValueError(f"output: expected a folder outside the input {source}, got {output}")
    files = [file for file in text_files(path) if not file.resolve().is_relative_to(output.resolve())]
    check_separator(separator, files)
    plan = _plan(files, reader, special_tokens, text_field, separator, eos_token_id, shard_tokens)
    _refuse_other_files(output)
    output.mkdir(parents=True, exist_ok=True)
    with locked_folder(output, "wait until it ends, or name another folder"):
        records = _begin(output, plan, reader)
        if not (output / MANIFEST).exists():
            pool = ProcessPoolExecutor(
                processes, initializer=_start_worker, initargs=(_carried(reader), special_tokens)
            )
            try:
                records += _write_shards(output, files, plan, records, pool, processes)
            finally:
                pool.shutdown(cancel_futures=True)
            _finish(output, files, plan, records)
    _report(output, files, plan, records)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan(
    files: list[Path],
    tokenizer: DataTokenizer,
    special_tokens: SpecialTokens,
    text_field: str,
    separator: str | None,
    eos_token_id: int | None,
    shard_tokens: int,
) -> Plan:
    carried = _carried(tokenizer)
    return Plan(
        version=VERSION,
        tokenizer_sha256=carried and hashlib.sha256(carried.encode()).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        dtype=token_type(tokenizer.vocab_size),
        text_field=text_field,
        separator=separator,
        eos_token_id=eos_token_id,
        shard_tokens=shard_tokens,
        files=_state(files),
        special_tokens=special_tokens,
    )


def _state(files: list[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of files; bytes of a name that are not UTF-8 are escaped, as JSON requires."""
    names = (os.fsencode(file).decode(errors="backslashreplace") for file in files)
    return [(name, *state) for name, state in zip(names, map(size_and_time, files), strict=True)]


def _carried(tokenizer: DataTokenizer) -> str | None:
    """Content of the tokenizer's file; None if tokens are bytes."""
    return None if isinstance(tokenizer, ByteTokenizer) else tokenizer.to_json()


def _refuse_other_files(output: Path) -> None:
    """Refuse a folder with other files.

    Raises:
        ValueError: if it holds files that this command does not write.
    """
    if not output.exists() or (output / PLAN).exists():
        return
    if not output.is_dir() or any(
        not file.name.endswith(".tmp") and file.name not in (LOCK, HOLDER) for file in output.iterdir()
    ):
        raise ValueError(f"{output}: expected a new or empty folder, or one of this command; got other files there")


def _begin(output: Path, plan: Plan, tokenizer: DataTokenizer) -> list[ShardRecord]:
    """Start or continue a folder, and return its finished shards, checked.

    Raises:
        ValueError: if the folder was started with other options or files, or holds a damaged shard.
    """
    records, finished = read_records(output), (output / MANIFEST).exists()
    if (output / PLAN).exists() and (records or finished):
        _refuse_other_plan(output, plan, records, finished)
    write_json(output / PLAN, asdict(plan))
    if carried := _carried(tokenizer):
        write_text(output / TOKENIZER, carried)
    kept = {record.name for record in records}
    for file in output.iterdir():  # shards after a missing one, perhaps of another plan
        if (match := _SHARD_FILE.fullmatch(file.name)) and match[1] not in kept:
            file.unlink()
    for record in tqdm(records, desc="check", unit="shard", disable=not records):
        record.verify(output)
    return records


def _refuse_other_plan(output: Path, plan: Plan, records: list[ShardRecord], finished: bool) -> None:
    """Keep a folder from mixing different shards.

    Raises:
        ValueError: if it was started with other options or input files.
    """
    begun = read_plan(output)
    if records and records[-1].next_file > len(begun.files):
        raise ValueError(
            f"{output / records[-1].name}.json: next_file: expected at most the {len(begun.files)} files of {PLAN}, "
            f"got {records[-1].next_file}; delete the file and prepare again"
        )
    names = [field.name for field in fields(Plan) if field.name != "files"]
    changed = [name for name in names if getattr(begun, name) != getattr(plan, name)]
    if changed := changed + _changed_files(begun, plan, None if finished else records):
        raise ValueError(
            f"{output}: expected the options and files it was started with, got other {', '.join(changed)}; name "
            "another folder"
        )


def _changed_files(begun: Plan, plan: Plan, records: list[ShardRecord] | None) -> list[str]:
    """Describe the first changed input file, of those in finished shards, or of all if `records` is None."""
    old, new = begun.files, plan.files
    if records is not None:
        read = records[-1].next_file + (records[-1].next_line > 0) if records else 0
        old, new = old[:read], new[:read]
    return next(([f"files (first {(b or a)[0]})"] for a, b in itertools.zip_longest(old, new) if a != b), [])


def _write_shards(
    output: Path,
    files: list[Path],
    plan: Plan,
    done: list[ShardRecord],
    pool: ProcessPoolExecutor,
    processes: int,
) -> list[ShardRecord]:
    """Write the shards after those that are done."""
    before = np.cumsum([0, *(size for _, size, _ in plan.files)])
    place = (done[-1].next_file, done[-1].next_line) if done else (0, 0)
    eos = np.array([] if plan.eos_token_id is None else [plan.eos_token_id], plan.dtype)
    records: list[ShardRecord] = []
    shape = np.dtype(plan.dtype), plan.tokenizer_sha256 is not None
    writer = ShardWriter(output, len(done), *shape)
    bar = tqdm(total=int(before[-1]), initial=int(before[place[0]]), desc="prepare", unit="B", unit_scale=True)
    try:
        for file, piece, (tokens, lengths) in _tokenized(pool, processes, _pieces(files, place, plan)):
            writer.add(tokens, piece.bytes, lengths)
            bar.update(int(before[file]) + piece.read - bar.n)
            if piece.next_line == -1:
                continue
            writer.end_document(eos)
            place = (file + 1, 0) if piece.next_line is None else (file, piece.next_line)
            if writer.tokens >= plan.shard_tokens:
                records.append(writer.finish(*place))
                writer = ShardWriter(output, len(done) + len(records), *shape)
        if writer.tokens:
            records.append(writer.finish(*place))
    except BrokenProcessPool as error:
        raise ValueError(
            "a tokenizing process was killed, perhaps for lack of memory; lower --processes and run the command again"
        ) from error
    finally:
        writer.discard()
        bar.close()
    return records


def _finish(output: Path, files: list[Path], plan: Plan, records: list[ShardRecord]) -> None:
    """Write the manifest.

    Raises:
        ValueError: if there was no text, a file has changed since the start, or the shard records do not agree.
    """
    if not records:
        raise ValueError(f"expected text, got {len(files)} files without any")
    if changed := next((old[0] for old, new in zip(plan.files, _state(files), strict=True) if old != new), None):
        raise ValueError(
            f"{changed}: expected a file that stays unchanged while it is read, got a new size or time; "
            f"delete {output} or name another folder, and prepare again"
        )
    totals = {name: sum(getattr(record, name) for record in records) for name in ("tokens", "documents", "bytes")}
    try:
        manifest = Manifest(**vars(plan), **totals, shards=records)
    except ValueError as error:
        raise ValueError(
            f"{output}: expected shard records that agree, got {error}; a shard-*.json is damaged: delete "
            f"{output} or name another folder, and prepare again"
        ) from error
    write_json(output / MANIFEST, asdict(manifest))


def _report(output: Path, files: list[Path], plan: Plan, records: list[ShardRecord]) -> None:
    """Print the size of a finished folder; warn if the separator probably separates nothing."""
    documents = sum(r.documents for r in records)
    print(
        f"{output}: {sum(r.tokens for r in records):,} tokens, {documents:,} documents, "
        f"{sum(r.bytes for r in records):,} bytes, {len(records)} shards"
    )
    if plan.separator is not None and documents <= len(files):
        warnings.warn(
            f"separator: expected {plan.separator!r} between documents, got no more documents than files; in bash, "
            "$'\\n' is a line feed",
            stacklevel=3,
        )


def _pieces(files: list[Path], start: _Place, plan: Plan) -> Iterator[tuple[int, Piece]]:
    """Pieces of text from a place on, each with the number of its file."""
    for number in range(start[0], len(files)):
        skip = start[1] if number == start[0] else 0
        for piece in read_documents(files[number], plan.text_field, skip, plan.separator):
            yield number, piece


def _tokenized(
    pool: ProcessPoolExecutor, processes: int, pieces: Iterable[tuple[int, Piece]]
) -> Iterator[tuple[int, Piece, tuple]]:
    """Pieces with their tokens, in order; reads only as much text as the processes need."""
    waiting: deque[tuple[list[tuple[int, Piece]], Future]] = deque()

    def first() -> Iterator[tuple[int, Piece, tuple]]:
        task, future = waiting.popleft()
        for (file, piece), encoded in zip(task, future.result().pieces(), strict=True):
            yield file, piece, encoded

    for task in _tasks(pieces):
        waiting.append((task, pool.submit(_encode, [piece.text for _, piece in task])))
        if len(waiting) > _TASKS_AHEAD * processes:
            yield from first()
    while waiting:
        yield from first()


def _tasks(pieces: Iterable[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    """Group pieces into lists of about `_TASK_BYTES` bytes of text."""
    task: list[tuple[int, Piece]] = []
    size = 0
    for item in pieces:
        task.append(item)
        size += item[1].bytes
        if size >= _TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


_tokenizer: DataTokenizer  # set in each tokenizing process


def _start_worker(tokenizer: str | None, special_tokens: SpecialTokens) -> None:
    """Set up a process, and end it when its parent ends for any reason."""
    global _tokenizer
    _tokenizer = ByteTokenizer() if tokenizer is None else FileTokenizer.of_json(tokenizer, special_tokens)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(texts: list[str]) -> _Encoded:
    if isinstance(_tokenizer, ByteTokenizer):  # without lists of tokens
        data = [text.encode() for text in texts]
        return _Encoded(np.frombuffer(b"".join(data), np.uint8), [len(text) for text in data], None)
    tokens, ends = zip(*map(_tokenizer.encode_with_ends, texts), strict=True)
    lengths = np.concatenate([np.diff(x, prepend=0) for x in ends])
    return _Encoded(
        np.concatenate(tokens).astype(np.min_scalar_type(_tokenizer.vocab_size - 1)),
        [len(x) for x in tokens],
        lengths.astype(np.uint8 if lengths.max(initial=0) < 256 else np.uint32),
    )
