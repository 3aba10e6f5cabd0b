"""Reading files that may be damaged or hostile: only regular files, known fields and unaltered content.

Every error is one line that names the file and the field, if any.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import msgspec

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

VERIFY_VARIABLE = "DMA_VERIFY_FILES"  # environment variable: 0 skips the content checks


def verifies_content() -> bool:
    """Whether reading checkpoints, exports and prepared shards checks their content.

    Raises:
        ValueError: if the environment variable is neither 0 nor 1.
    """
    value = os.environ.get(VERIFY_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VERIFY_VARIABLE}: expected 0 or 1, got {value!r}")
    return value == "1"


def check_regular(path: Path, what: str) -> None:
    """Refuse anything but a regular file: reading a pipe or a device may never end.

    Args:
        path: path of the file; links are followed.
        what: the kind of file, for the message.

    Raises:
        ValueError: if the file is missing or not a regular file.
    """
    if not path.is_file():
        found = "something that is not a regular file" if path.exists() else "no such file"
        raise ValueError(f"{path}: expected {what}, got {found}")


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Read a JSON file into a validated value.

    Args:
        path: path of the file.
        kind: type of the content, such as a `msgspec.Struct` or a dataclass.
        what: the kind of file, for the message.

    Raises:
        ValueError: if the file is missing or is not JSON, or a field is missing or has the wrong type; the message
            names the field.
    """
    check_regular(path, what)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what}: {error}") from error


@overload
def as_kind(value: Any, kind: type[T], what: str) -> T: ...


@overload
def as_kind(value: Any, kind: Any, what: str) -> Any: ...  # for types that are not classes, such as unions


def as_kind(value: Any, kind: Any, what: str) -> Any:
    """Validate a plain value from a file.

    Args:
        value: containers, numbers and text.
        kind: the expected type.
        what: the file and field it comes from, for the message.

    Raises:
        ValueError: if a field is missing or has the wrong type; the message names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"{what}: {error}") from error


def sha256(path: Path) -> str:
    """SHA-256 hash of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
