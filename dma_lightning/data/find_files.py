"""Finds the files that hold the text."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

JSONL, COMPRESSED = (".jsonl", ".ndjson"), (".gz", ".zst")  # file name endings, in lower case


def text_files(path: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted; folders are searched recursively, links included.

    Raises:
        ValueError: if there is none, or a link points nowhere.
        OSError: if a folder cannot be read.
    """
    root = user_path(path)
    found = [root] if root.exists() else [Path(match) for match in glob.glob(str(root), recursive=True)]
    files: set[Path] = set()
    for match in found:
        files.update(file for file in (_below(match) if match.is_dir() else [match]) if file.is_file())
    if not files:
        raise ValueError(f"path: expected a text file, a folder with files or a glob that matches, got {path!r}")
    return sorted(files)


def user_path(path: str | Path) -> Path:
    """A path with `~` resolved.

    Raises:
        ValueError: if it names the home of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"path: expected a known user behind ~, got {str(path)!r}; write the full path") from error


def everybody_may_read(files: Iterable[Path]) -> bool:
    """Whether all users may read the files and enter every folder above them."""
    real = [Path(os.path.realpath(file)) for file in files]
    folders = {folder for file in real for folder in file.parents}
    needed = [(file, stat.S_IROTH) for file in real] + [(folder, stat.S_IXOTH) for folder in folders]
    return all(path.stat().st_mode & permission for path, permission in needed)


def _below(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden, once."""
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
