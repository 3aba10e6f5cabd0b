"""Which files hold the text."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

JSONL, COMPRESSED = (".jsonl", ".ndjson"), (".gz", ".zst")  # endings of names, in small letters


def text_files(path: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted; folders are searched to the bottom, links too.

    Raises:
        ValueError: if there is none, or a link points nowhere.
        OSError: if a folder cannot be read.
    """
    root = Path(path).expanduser()
    found = [root] if root.exists() else [Path(match) for match in glob.glob(str(root), recursive=True)]
    files: set[Path] = set()
    for match in found:
        files.update(file for file in (_below(match) if match.is_dir() else [match]) if file.is_file())
    if not files:
        raise ValueError(f"path: expected a text file, a folder with files or a glob that matches, got {path!r}")
    return sorted(files)


def _below(folder: Path) -> Iterator[Path]:
    """What is below a folder, once, and is not hidden."""
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            if not file.exists():
                raise ValueError(f"path: expected files, got a link that points nowhere: {file}; remove or mend it")
            yield file


def _fail(error: OSError) -> None:
    raise error
