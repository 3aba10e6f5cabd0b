"""Finds the files that hold the text."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from dma_lightning.files.reading import check_regular, read_json

JSONL, COMPRESSED = (".jsonl", ".ndjson"), (".gz", ".zst")  # file name endings, in lower case
PARQUET = ".parquet"

# Files of the library datasets: in the folder of a `Dataset`, and in that of a `DatasetDict`.
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


class _DataFile(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    data_files: list[_DataFile] = msgspec.field(name="_data_files")


class _Splits(msgspec.Struct):
    splits: list[str]


def text_files(path: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted; folders are searched recursively, links included.

    A folder that `Dataset.save_to_disk` wrote stands for its files.

    Raises:
        ValueError: if there is none, if a link points nowhere, or if a saved `DatasetDict` has several splits.
        OSError: if a folder cannot be read.
    """
    root = user_path(path)
    found = [root] if root.exists() else [Path(match) for match in glob.glob(str(root), recursive=True)]
    files: set[Path] = set()
    for match in found:
        below = _below(match) if match.is_dir() else [match]
        files.update(file for file in below if file.is_file() or is_saved_dataset(file))
    if not files:
        raise ValueError(f"path: expected a text file, a folder with files or a glob that matches, got {path!r}")
    return sorted(file for file in files if file.parent not in files)  # a glob also matches a dataset's own files


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote a folder."""
    return (folder / _STATE).is_file() and (folder / _INFO).is_file()


def dataset_files(folder: Path) -> list[Path]:
    """The files with the rows of a saved dataset, in order.

    Raises:
        ValueError: if the folder is damaged, or names files elsewhere.
    """
    state = read_json(folder / _STATE, _State, "what `Dataset.save_to_disk` wrote")
    for name in (file.filename for file in state.data_files):
        if Path(name).name != name:
            raise ValueError(f"{folder / _STATE}: expected names of files in its folder, got {name!r}; save it again")
        check_regular(folder / name, "a file of the dataset")
    return [folder / file.filename for file in state.data_files]


def size_and_time(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a file, or of the files of a saved dataset together."""
    files = [*dataset_files(path), path / _STATE] if path.is_dir() else [path]
    states = [file.stat() for file in files]
    return sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)


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
    """Every file below a folder that is not hidden, once; of a saved dataset, its folder."""
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        if is_saved_dataset(Path(place)):
            folders.clear()
            yield Path(place)
            continue
        if (Path(place) / _SPLITS).is_file():
            folders.clear()
            yield _only_split(Path(place))
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            if not file.exists():
                raise ValueError(f"path: expected files, got a link that points nowhere: {file}; remove or fix it")
            yield file


def _only_split(folder: Path) -> Path:
    """The folder of the one split of a saved `DatasetDict`.

    Raises:
        ValueError: if it has several, which may be for training and for tests; or none.
    """
    splits = read_json(folder / _SPLITS, _Splits, "what `DatasetDict.save_to_disk` wrote").splits
    if len(splits) != 1:
        raise ValueError(
            f"{folder}: expected a dataset with one split, got {', '.join(splits) or 'none'}; name the folder of one, "
            f"such as {folder / (splits or ['train'])[0]}"
        )
    if Path(splits[0]).name != splits[0] or not is_saved_dataset(folder / splits[0]):
        raise ValueError(f"{folder / _SPLITS}: expected the name of a saved split, got {splits[0]!r}; save it again")
    return folder / splits[0]


def _fail(error: OSError) -> None:
    raise error
