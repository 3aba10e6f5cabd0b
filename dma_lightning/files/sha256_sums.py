"""`SHA256SUMS` beside the files of an export, in the format of `sha256sum -c`, so that damage can be detected."""

import re
from pathlib import Path

from dma_lightning.files.reading import check_regular, sha256, verifies_content

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *]([^/\\]+)")  # a hash, and the plain name of a file in the same folder


def write_sums(folder: Path) -> None:
    """Write the hashes of all files in a folder."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path) -> None:
    """Compare the listed files with their hashes, if there is a list; unlisted files are not checked.

    Raises:
        ValueError: if a listed file is missing or has other content, or the list is malformed.
    """
    path = folder / SUMS
    if not verifies_content() or not (path.exists() or path.is_symlink()):
        return
    check_regular(path, "hashes of the files in this folder")
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        listed = _LINE.fullmatch(line)
        if not listed:
            raise ValueError(f"{path}: line {number}: expected a SHA-256 hash and a plain file name, got {line[:99]!r}")
        file, hash_ = folder / listed[2], listed[1].lower()
        check_regular(file, f"the file that {SUMS} lists")
        if sha256(file) != hash_:
            raise ValueError(
                f"{file}: expected content that matches its hash in {SUMS}, got other content; restore an intact "
                "copy, or delete its line there if you changed the file on purpose"
            )
