"""`SHA256SUMS` beside the files of an export, as `sha256sum -c` reads it: what was written can be told from damage."""

import re
from pathlib import Path

from dma_lightning.files.reading import check_regular, sha256, verifies_content

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *]([^/\\]+)")  # a hash, and the plain name of a file beside


def write_sums(folder: Path) -> None:
    """List the hashes of all files of a folder."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path) -> None:
    """Compare the files that are listed with their hashes, if there is a list; files that are not listed are not.

    Raises:
        ValueError: if a file is missing or has other content, or the list says something else.
    """
    path = folder / SUMS
    if not verifies_content() or not (path.exists() or path.is_symlink()):
        return
    check_regular(path, "hashes of the files beside")
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        listed = _LINE.fullmatch(line)
        if not listed:
            raise ValueError(f"{path}: line {number}: expected a SHA-256 hash and a plain file name, got {line[:99]!r}")
        file, hash_ = folder / listed[2], listed[1].lower()
        check_regular(file, f"the file that {SUMS} lists")
        if sha256(file) != hash_:
            raise ValueError(
                f"{file}: expected the content of which {SUMS} has the hash, got other content; bring back a whole "
                "copy, or delete its line there if the file was changed on purpose"
            )
