"""Checksums in the zip files of `torch.save`: torch writes them but does not check them when it reads."""

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities import rank_zero_warn

from dma_lightning.files.reading import verifies_content

_verified: set[tuple] = set()  # files, or parts of files, that this process has checked


def check_records(path: Path, offset: int = 0, length: int | None = None) -> None:
    """Check the records of a file written by `torch.save` against their checksums, once per process and content.

    Args:
        path: path of the file.
        offset: byte at which the zip file starts.
        length: size of the zip file in bytes. Default: the whole file.

    Raises:
        ValueError: if a record differs, or `torch.save` did not write the file; the message omits the path.
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
        # Compressed or overlapping records could unpack to far more than the size of the file.
        if any(x.compress_type != zipfile.ZIP_STORED for x in records) or sum(x.file_size for x in records) > size:
            raise ValueError("expected records that are not compressed and do not overlap, got other records")
        if not any(record.CRC for record in records):
            rank_zero_warn(f"{path}: was written without checksums, so damage cannot be detected")
            return
        damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeError, struct.error) as error:
        raise ValueError(f"expected a file written by torch.save: {error}") from error
    if damaged is not None:
        raise ValueError(f"record {damaged!r} differs from its checksum")
