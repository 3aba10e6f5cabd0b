"""A checkpoint in which a single bit has changed is refused."""

import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.serialization import set_crc32_options

from dma_lightning.checkpoints.io import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from dma_lightning.checkpoints.sharded import META, check_shards, sharded_weights
from dma_lightning.files import zip_checksums

CONTENT = {"state_dict": {"a": torch.arange(300.0), "b": torch.ones(7)}, "lr_schedulers": [], "global_step": 5}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Forget which files other tests have already verified."""
    zip_checksums._verified.clear()
    yield
    zip_checksums._verified.clear()


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "new.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def first_bytes(path: Path) -> dict[str, int]:
    """Where the content of each record of a zip file begins."""
    reader = torch._C.PyTorchFileReader(str(path))
    return {name: reader.get_record_offset(name) for name in reader.get_all_records()}


def test_a_flipped_bit_in_any_record_is_seen(saved: Path) -> None:
    whole, records = saved.read_bytes(), first_bytes(saved)
    assert {"data.pkl", "data/0", "data/1", "byteorder", "version"} <= records.keys()
    for start in records.values():
        for bit in range(0, 8, 3):
            saved.write_bytes(whole)
            read_checkpoint(saved)
            flip(saved, start, bit)
            with pytest.raises(
                ValueError, match=r"new\.ckpt: expected a whole checkpoint, got one that cannot be read"
            ):
                read_checkpoint(saved)


def test_a_flipped_bit_anywhere_changes_no_number(saved: Path) -> None:
    """Beside records there are names, sizes and padding; a change of these is an error or nothing."""
    whole = saved.read_bytes()
    refused = 0
    for byte in range(0, len(whole), 13):
        flip(saved, byte, byte % 8)
        try:
            found = read_checkpoint(saved)["state_dict"]
        except ValueError:
            refused += 1
        else:
            torch.testing.assert_close(found, CONTENT["state_dict"], rtol=0, atol=0)
        saved.write_bytes(whole)
    assert refused > len(whole) / 13 / 3


def test_the_last_is_the_older_whole_one(saved: Path) -> None:
    older = saved.with_name("old.ckpt")
    older.write_bytes(saved.read_bytes())
    saved.touch()
    flip(saved, first_bytes(saved)["data/0"] + 100, 4)
    with pytest.warns(
        UserWarning, match=r"last skips .*new\.ckpt: expected a whole .*\(record '.*data/0' differs from"
    ):
        assert newest_checkpoint([saved.parent]) == older
    with pytest.raises(ValueError, match=r"differs from its checksum"):
        AtomicCheckpointIO().load_checkpoint(saved)


def test_checks_can_be_switched_off(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(saved, first_bytes(saved)["data/0"], 4)
    monkeypatch.setenv("DMA_VERIFY_FILES", "0")
    assert not torch.equal(read_checkpoint(saved)["state_dict"]["a"], CONTENT["state_dict"]["a"])
    monkeypatch.setenv("DMA_VERIFY_FILES", "no")
    with pytest.raises(ValueError, match=r"^DMA_VERIFY_FILES: expected 0 or 1, got 'no'"):
        read_checkpoint(saved)


def test_a_file_is_checked_once_until_it_changes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, real = [], zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: (checked.append(1), real(self))[1])
    for _ in range(3):
        read_checkpoint(saved)
    assert len(checked) == 1
    AtomicCheckpointIO().save_checkpoint(CONTENT, saved)
    read_checkpoint(saved)
    assert len(checked) == 2


def test_files_without_checksums_are_read_with_a_warning(tmp_path: Path) -> None:
    set_crc32_options(False)
    try:
        torch.save(CONTENT, tmp_path / "a.ckpt")
    finally:
        set_crc32_options(True)
    with pytest.warns(UserWarning, match=r"a\.ckpt: was written without checksums, so damage cannot be detected"):
        assert read_checkpoint(tmp_path / "a.ckpt")["global_step"] == 5


def test_files_that_unpack_to_more_than_they_are(saved: Path) -> None:
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(saved.with_name("b.ckpt"), "w", 8) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"b\.ckpt: .*expected records that are not compressed"):
        read_checkpoint(saved.with_name("b.ckpt"))


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"\x80\x02}q\x00.", b"text" * 99])
def test_other_files_are_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt: expected a whole checkpoint, got one that cannot be read") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_files_that_may_not_be_read_are_not_damaged(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dma_lightning.checkpoints.io.check_records", forbidden)
    for read in (lambda: read_checkpoint(saved), lambda: newest_checkpoint([saved.parent])):
        with pytest.raises(PermissionError, match=r"new\.ckpt: expected a checkpoint that you may read, got .*denied"):
            read()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sharded checkpoint, which is a folder; with the weights file that one process has written."""
    folder = tmp_path / "sharded.ckpt"
    save({"state_dict": CONTENT["state_dict"], "plain": [1, 2]}, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"global_step": 5, "lr_schedulers": []}, folder / META)
    return folder


def test_shards_are_checked_tensor_by_tensor(sharded: Path) -> None:
    assert read_checkpoint(sharded)["global_step"] == 5
    shapes = {name: entry.size for name, entry in sharded_weights(sharded).items()}
    assert shapes == {name: weight.shape for name, weight in CONTENT["state_dict"].items()}
    (file,) = sharded.glob("*.distcp")
    places = FileSystemReader(sharded).read_metadata().storage_data.values()
    assert len(places) == 3
    for place in places:
        flip(file, place.offset + place.length // 2)
        with pytest.raises(ValueError, match=rf"distcp, byte {place.offset}: (record|expected a file of torch\.save)"):
            read_checkpoint(sharded)
        flip(file, place.offset + place.length // 2)
    check_shards(sharded)


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "", "..", "sub/x.distcp", "link.distcp", "pipe", 5])
def test_an_index_names_files_of_its_folder_alone(name: str, sharded: Path) -> None:
    (file,) = sharded.glob("*.distcp")
    (sharded.parent / "other.distcp").write_bytes(file.read_bytes())
    (sharded / "link.distcp").symlink_to("../other.distcp")
    os.mkfifo(sharded / "pipe")
    index = FileSystemReader(sharded).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = name
    (sharded / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        ValueError, match=r"expected the name of a file in this folder|not a regular file|Expected `str`"
    ):
        read_checkpoint(sharded)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"garbage"])
def test_a_damaged_index_is_told(content: bytes, sharded: Path) -> None:
    (sharded / ".metadata").write_bytes(content)
    for check in (read_checkpoint, check_shards):
        with pytest.raises(ValueError, match=r"\.metadata: expected the index of a sharded checkpoint, got"):
            check(sharded)
