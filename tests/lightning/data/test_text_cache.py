"""The cache of a text is used only if it is complete. Whoever may not read the text cannot read its cache either."""

import json
import os
import shutil
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_texts import make_data, read, write_tokenizer

from dma_lightning import TextDataModule
from dma_lightning.data.find_files import everybody_may_read

TEXT = "the words of a text\n" * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text, a tokenizer, and their cache."""
    (tmp_path / "a.txt").write_text(TEXT)
    write_tokenizer(tmp_path / "tokenizer.json")
    module(tmp_path).prepare_data()
    return tmp_path


def module(folder: Path) -> TextDataModule:
    return make_data(folder, folder / "a.txt", tokenizer=str(folder / "tokenizer.json"))


def use(folder: Path) -> None:
    data = module(folder)
    data.prepare_data()
    data.setup("fit")
    assert data.train_set[0]["label_bytes"] > 0


def content(folder: Path) -> dict[str, bytes]:
    return {file.suffix: file.read_bytes() for file in (folder / "cache").iterdir()}


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit in the array": (".bin", flip, r"\.bin: expected what was written, got other content"),
    "a flipped bit in the lengths": (".lengths", flip, r"\.lengths: expected what was written, got other content"),
    "an empty array": (".bin", lambda x: x.write_bytes(b""), r"\.bin: expected \d+ bytes, got 0"),
    "half of the lengths": (".lengths", lambda x: os.truncate(x, 9), r"\.lengths: expected \d+ bytes, got 9"),
    "no array": (".bin", Path.unlink, r"\.bin: expected a file of the text cache, got no such file"),
    "no lengths": (".lengths", Path.unlink, r"\.lengths: expected a file of the text cache, got no such file"),
    "no record, as of older versions": (
        ".json",
        Path.unlink,
        r"\.json: expected a file of the text cache, got no such",
    ),
    "a pipe": (".bin", lambda x: (x.unlink(), os.mkfifo(x)), r"\.bin: .* got something that is not a regular file"),
    "a torn record": (".json", lambda x: os.truncate(x, 30), r"\.json: expected a record of the text cache: "),
    "a newer record": (".json", lambda x: edit(x, version=2), r"`int` <= 1 - at `\$\.version`"),
    "a record of others": (".json", lambda x: edit(x, tokens=3), r"\.bin: expected 6 bytes, got"),
    "a token of another vocabulary": (".json", lambda x: edit(x, largest=300), r"largest: expected a token below 300"),
    "a largest token that is none": (".json", lambda x: edit(x, largest=1), r"expected 1 as the largest token, got"),
    "lengths of no type": (".json", lambda x: edit(x, lengths_dtype=None), r"expected lengths_dtype, got none"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_written_anew_with_a_warning(damage: str, folder: Path) -> None:
    whole = content(folder)
    suffix, do, message = DAMAGE[damage]
    do(next((folder / "cache").glob(f"*{suffix}")))
    with pytest.warns(UserWarning, match=rf"{message}.*; the text is read again, and the file is rewritten") as told:
        module(folder).prepare_data()
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert content(folder) == whole
    with warnings.catch_warnings(action="error"):
        use(folder)


def test_the_check_of_content_can_be_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = next((folder / "cache").glob("*.bin"))
    flip(array)
    damaged = array.read_bytes()
    monkeypatch.setenv("DMA_VERIFY_FILES", "0")
    use(folder)
    assert array.read_bytes() == damaged


@pytest.mark.parametrize("suffix", [".bin", ".lengths", ".json"])
def test_links_are_refused_and_left_alone(suffix: str, folder: Path) -> None:
    file = next((folder / "cache").glob(f"*{suffix}"))
    (folder / "precious").write_text("kept")
    for target in ("precious", "nowhere"):
        file.unlink()
        file.symlink_to(folder / target)
        for begin in (TextDataModule.prepare_data, lambda data: data.setup("fit")):
            with pytest.raises(ValueError, match=rf"{suffix}: expected a file of this cache, got a link; remove it"):
                begin(module(folder))
        assert file.is_symlink()
    assert (folder / "precious").read_text() == "kept"
    assert not (folder / "nowhere").exists()


def test_setup_without_a_cache_is_told(folder: Path) -> None:
    shutil.rmtree(folder / "cache")
    with pytest.raises(ValueError, match=r"\.bin: expected a file of the text cache, got no such file"):
        module(folder).setup("fit")


def test_a_text_that_changes_while_it_is_read_leaves_no_cache(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    data = make_data(tmp_path, tmp_path / "a.txt")
    assert data.fingerprint  # which reads the text
    (tmp_path / "a.txt").write_text(TEXT.upper())
    with pytest.raises(ValueError, match="path: expected a text that nobody changes while it is read, got another at"):
        data.prepare_data()
    assert not list((tmp_path / "cache").iterdir())
    train, _ = read(make_data(tmp_path, tmp_path / "a.txt"))
    assert TEXT.upper().encode().startswith(train)


def test_many_may_write_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 50)
    failed = []

    def run() -> None:
        try:
            read(make_data(tmp_path, tmp_path / "a.txt"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".bin", ".json"]


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in (folder / "cache").iterdir()}


@pytest.mark.parametrize(
    ("text_mode", "folder_mode", "expected"), [(0o644, 0o755, 0o644), (0o640, 0o755, 0o600), (0o644, 0o750, 0o600)]
)
def test_the_cache_is_as_private_as_the_text(text_mode: int, folder_mode: int, expected: int, public: Path) -> None:
    """Links do not make a text public: the folders count that it is in."""
    text = public / "texts/a.txt"
    text.parent.mkdir()
    for file in (text, public / "tokenizer.json"):
        file.write_text(TEXT)
    (public / "a.txt").symlink_to(text)
    text.chmod(text_mode)
    text.parent.chmod(folder_mode)
    write_tokenizer(public / "tokenizer.json")
    assert everybody_may_read([public / "a.txt"]) == (expected == 0o644)
    before = os.umask(0o022)
    try:
        module(public).prepare_data()
    finally:
        os.umask(before)
    assert modes(public) == {expected}
    text.chmod(0o600)
    module(public).prepare_data()  # a text that has become private
    assert modes(public) == {0o600}


def test_an_unfinished_cache_is_private_from_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.txt").chmod(0o600)
    data, seen = make_data(tmp_path, tmp_path / "a.txt"), []
    chunks = data._unchanged_chunks

    def watched() -> Iterator[bytes]:
        for chunk in chunks():
            seen.append(modes(tmp_path))
            yield chunk

    monkeypatch.setattr(data, "_unchanged_chunks", watched)
    data.prepare_data()
    assert seen
    assert all(mode == {0o600} for mode in seen)
    assert np.fromfile(data._cache.array, np.uint8).tobytes() == TEXT.encode() + b"\n"


def test_an_unknown_home_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: expected a known user behind ~, got '~nobody-of-that-name/a\.txt'"):
        make_data(tmp_path, "~nobody-of-that-name/a.txt").prepare_data()
