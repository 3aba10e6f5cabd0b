"""Reading files that may be damaged or hostile: only regular files, only known fields, only content that was written.

Every error is one line that names the file and, where there is one, the field.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import msgspec

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

VERIFY_VARIABLE = "DMA_VERIFY_FILES"  # environment variable: 0 skips the checks of content


def verifies_content() -> bool:
    """Whether the content of checkpoints, exports and prepared shards is checked when they are read.

    Raises:
        ValueError: if the environment variable says neither yes nor no.
    """
    value = os.environ.get(VERIFY_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VERIFY_VARIABLE}: expected 0 or 1, got {value!r}")
    return value == "1"


def check_regular(path: Path, what: str) -> None:
    """Refuse whatever is not a regular file: reading a pipe or a device may never end.

    Args:
        path: of the file; links are followed.
        what: the kind of file, for the message.

    Raises:
        ValueError: if there is no such file, or it is not a regular one.
    """
    if not path.is_file():
        found = "something that is not a regular file" if path.exists() else "no such file"
        raise ValueError(f"{path}: expected {what}, got {found}")


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Read a JSON file into a validated value.

    Args:
        path: of the file.
        kind: type of the content, such as a `msgspec.Struct` or a dataclass.
        what: the kind of file, for the message.

    Raises:
        ValueError: if it is missing, no JSON, or a field is missing or of another type; with the field.
    """
    check_regular(path, what)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what}: {error}") from error


@overload
def as_kind(value: Any, kind: type[T], what: str) -> T: ...


@overload
def as_kind(value: Any, kind: Any, what: str) -> Any: ...  # of what is no class, such as a union


def as_kind(value: Any, kind: Any, what: str) -> Any:
    """Validate a plain value that a file held.

    Args:
        value: containers, numbers and text.
        kind: the type that it should have.
        what: file and field that it is from, for the message.

    Raises:
        ValueError: if a field is missing or of another type; with the field.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"{what}: {error}") from error


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
