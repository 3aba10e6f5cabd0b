"""Checksums in the zip files of `torch.save`, which torch writes but does not compare when it reads."""

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities import rank_zero_warn

from dma_lightning.files.reading import verifies_content

_verified: set[tuple] = set()  # files, or parts of them, that this process has found whole


def check_records(path: Path, offset: int = 0, length: int | None = None) -> None:
    """Compare the records of a file of `torch.save` with their checksums, once per process and content.

    Args:
        path: of the file.
        offset: byte at which the zip file begins.
        length: bytes of the zip file. Default: the whole file.

    Raises:
        ValueError: if a record differs, or this is no such file; without the path.
    """
    if not verifies_content():
        return
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        identity = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino, offset, length)
        if identity in _verified:
            return
        file.seek(offset)
        _check_zip(file if length is None else io.BytesIO(file.read(length)), length or status.st_size, path)
    _verified.add(identity)


def _check_zip(file: BinaryIO, size: int, path: Path) -> None:
    try:
        archive = zipfile.ZipFile(file)
        records = archive.infolist()
        # Others could unpack to far more than the size of the file.
        if any(x.compress_type != zipfile.ZIP_STORED for x in records) or sum(x.file_size for x in records) > size:
            raise ValueError("expected records that are not compressed and do not overlap")
        if not any(record.CRC for record in records):
            rank_zero_warn(f"{path}: was written without checksums, so damage cannot be seen")
            return
        damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeError, struct.error) as error:
        raise ValueError(f"expected a file of torch.save: {error}") from error
    if damaged is not None:
        raise ValueError(f"record {damaged!r} differs from its checksum")
