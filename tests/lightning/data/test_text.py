"""Text as bytes: what is read, cached, split and refused."""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from small_texts import make_data, read, write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dma_lightning import FileTokenizer
from dma_lightning.cli.prepare import prepare
from dma_lightning.data import text_formats


def test_splits_by_position(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 999, dtype=np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(text)
    train, val = read(make_data(tmp_path, tmp_path / "a.txt"))
    assert train == (text + b"\n")[:790]  # 800 bytes are 79 whole windows and their labels
    assert val == (text + b"\n")[800:990]


def test_reads_folders_and_globs_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.md", ".hidden", ".git/config"):
        file = tmp_path / "text" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name.ljust(60, "."))
    whole = b"".join(name.ljust(60, ".").encode() + b"\n" for name in ("b.txt", "sub/a.md"))
    train, _ = read(make_data(tmp_path, tmp_path / "text"))
    assert whole.startswith(train)
    train, _ = read(make_data(tmp_path, tmp_path / "text/**/*.md", val_fraction=0.5))
    assert train == b"sub/a.md".ljust(30, b".")[: len(train)]


def test_default_corpus_are_the_help_topics(tmp_path: Path) -> None:
    train, val = read(make_data(tmp_path, None, val_fraction=0.1, sequence_length=256))
    whole = "".join(topic + "\n" for topic in topics.values()).encode()
    assert whole.startswith(train)
    assert len(val) == round(0.1 * len(whole)) // 256 * 256


def test_array_is_written_once_under_a_name_made_from_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 100)
    read(make_data(tmp_path, file))
    (array,) = (tmp_path / "cache").glob("*.bin")
    written = array.stat().st_mtime_ns
    read(make_data(tmp_path, file))
    assert array.stat().st_mtime_ns == written
    file.write_text("y" * 100)
    train, _ = read(make_data(tmp_path, file))
    assert train == b"y" * 80
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2


def test_loaders_shuffle_training_only(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(256)) * 4)
    data = make_data(tmp_path, file)
    read(data)
    loader = data.train_dataloader()
    first = [batch["input_ids"][:, 0].tolist() for batch in loader]
    assert first == [batch["input_ids"][:, 0].tolist() for batch in data.train_dataloader()]
    loader.sampler.set_epoch(1)
    assert first != [batch["input_ids"][:, 0].tolist() for batch in loader]
    for loader in (data.val_dataloader, data.test_dataloader, data.predict_dataloader):
        rows = [row for batch in loader() for row in batch["input_ids"].tolist()]
        assert rows == [data.val_set[i]["input_ids"].tolist() for i in range(len(data.val_set))]


@pytest.mark.parametrize(
    ("content", "changed", "message"),
    [
        (None, {}, "path: expected a text file, a folder with files or a glob that matches, got"),
        ("", {}, "path: expected text, got only empty files at"),
        ("x" * 40, {}, r"training and validation parts \(33 and 8 tokens\) must each exceed sequence_length = 10"),
    ],
)
def test_bad_text(tmp_path: Path, content: str | None, changed: dict[str, int], message: str) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read(make_data(tmp_path, file, **changed))


@pytest.mark.parametrize("tokenizer", [False, True])
def test_files_have_the_text_that_prepare_reads(
    tokenizer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte order marks at the beginning, ends of lines as they are, and files without text, which add nothing."""
    monkeypatch.setattr(text_formats, "_CHUNK", 3)
    mark, file = b"\xef\xbb\xbf", None
    contents = [mark + b"with a mark\r\n\r\n", mark, b"", b"old\rends" + mark, b"\n", mark + mark + b"\na\fb"]
    (tmp_path / "in").mkdir()
    for i, content in enumerate(contents):
        (tmp_path / f"in/{i}.txt").write_bytes(content)
    if tokenizer:
        write_tokenizer(file := tmp_path / "tokenizer.json")
    prepare(str(tmp_path / "in"), tmp_path / "out", file and str(file), processes=1)
    data = make_data(tmp_path, tmp_path / "in", tokenizer=file and str(file))
    data.prepare_data()
    tokens = np.fromfile(tmp_path / "out/shard-00000.tokens", data._cache.dtype)
    ends = np.load(tmp_path / "out/shard-00000.ends.npy")
    documents = ["".join(data.tokenizer.decode_stream(x.tolist())) for x in np.split(tokens, ends[:-1])]
    whole = np.fromfile(data._cache.array, data._cache.dtype).tolist()
    assert documents == ["with a mark\r\n\r\n", "old\rends\ufeff", "\n", "\ufeff\na\fb"]
    assert "".join(data.tokenizer.decode_stream(whole)) == "".join(document + "\n" for document in documents)


@pytest.mark.parametrize("content", ["", "\ufeff"])
def test_files_without_text_are_no_text(content: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="path: expected text, got only empty files at"):
        make_data(tmp_path, tmp_path / "[ab]").prepare_data()
    for eos in (None, 0):
        with pytest.raises(ValueError, match="expected text, got 2 files without any"):
            prepare(str(tmp_path / "[ab]"), tmp_path / f"out-{eos}", eos_token_id=eos, processes=1)


@pytest.mark.parametrize("name", ["a.json", "a.TAR", "a.tar.gz", "a.tgz"])
def test_what_would_pass_for_text_is_refused_as_prepare_does_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text " * 99)
    for read_it in (
        make_data(tmp_path, tmp_path / name).prepare_data,
        lambda: prepare(str(tmp_path / name), tmp_path / "out", processes=1),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected text or JSONL, got \.(json|tar|tgz); unpack it"):
            read_it()


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.GZ", "a.zst"])
def test_what_is_no_plain_text_is_for_prepare(name: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_text("text")
    with pytest.raises(ValueError, match=rf"path: expected plain text, got .*{name}; `dma-lightning prepare` reads"):
        make_data(tmp_path, tmp_path / "text").prepare_data()


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(ValueError, match="path: expected a text file, a folder with files"):
        make_data(tmp_path, tmp_path / "text").prepare_data()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 0}, "sequence_length: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"val_fraction": 1.0}, "val_fraction: expected a share between 0 and 1, got 1.0"),
    ],
)
def test_bad_arguments(tmp_path: Path, changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(tmp_path, None, **changed)


def test_a_tokenizer_makes_the_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    text = "Größe 𝄞, and words\n" * 50 + "no end of line"
    (tmp_path / "a.txt").write_text(text)
    data = make_data(tmp_path, tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    assert (data.vocab_size, data._cache.dtype) == (300, np.uint16)
    data.prepare_data()
    tokens = np.fromfile(data._cache.array, dtype=data._cache.dtype).tolist()
    assert "".join(data.tokenizer.decode_stream(tokens)) == text + "\n"
    assert data.bytes_per_token == len((text + "\n").encode()) / len(tokens) > 1
    data.setup("fit")
    item = data.train_set[0]
    assert item["input_ids"].tolist() == tokens[:10]
    assert torch.equal(item["input_ids"][1:], item["labels"][:-1])
    assert make_data(tmp_path, tmp_path / "a.txt")._cache.array != data._cache.array
    assert make_data(tmp_path, tmp_path / "a.txt").bytes_per_token == 1


def test_where_text_is_cut_for_reading_changes_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of lines that a tokenizer does not look across."""
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("Größe 𝄞, and words\n" * 20)
    found = []
    for chunk in (7, 1 << 20):
        monkeypatch.setattr("dma_lightning.data.text_formats._CHUNK", chunk)
        data = make_data(tmp_path, tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
        found.append([np.hstack(part).tolist() for part in list(zip(*data._tokens(), strict=True))[:2]])
    assert found[0] == found[1]


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_a_damaged_tokenizer_is_told(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer\.json of the library tokenizers"):
        make_data(tmp_path, None, tokenizer=str(path))


def test_pieces_of_text_are_those_of_the_whole(tmp_path: Path) -> None:
    """Also if a character is cut, or bytes are none; with the space that stands before a word."""
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    tokens = tokenizer.encode("Größe 𝄞 aé")
    assert "".join(tokenizer.decode_stream(tokens)) == "Größe 𝄞 aé"
    assert "".join(tokenizer.decode_stream(tokens[:-1])) == "Größe 𝄞 a\ufffd"
    assert all("\ufffd" not in piece for piece in tokenizer.decode_stream(tokens))
    for seed in range(20):
        noise = torch.randint(300, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        pieces = list(tokenizer.decode_stream(noise))
        assert len(pieces) == 61
        assert "".join(pieces).replace("\ufffd", "") == tokenizer.tokenizer.decode(noise).replace("\ufffd", "")

    words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "?": 2}, unk_token="?"))
    words.decoder = decoders.Metaspace()
    words.enable_truncation(1)
    words.enable_padding(length=5)
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = FileTokenizer.of_json(words.to_str())
    assert tokenizer.encode("the cat the") == [0, 1, 0]
    assert "".join(tokenizer.decode_stream([1, 0], after=[0])) == " cat the"
    assert "".join(tokenizer.decode_stream([1, 0])) == "cat the"
    with pytest.raises(ValueError, match=r"expected the content of a tokenizer\.json"):
        FileTokenizer.of_json("{}")


def test_long_lines_are_cut_between_words_and_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "_PIECE", 10)
    for whole in ("aé𝄞 bc " * 30, "é𝄞" * 50, "word " * 9 + "\n" + "é" * 40, "a\nb\n", "", " " * 33):
        for size in (1, 7, 64):
            chunks = [whole.encode()[i : i + size] for i in range(0, len(whole.encode()), size)]
            pieces = [piece.decode() for piece in text_formats.byte_pieces(chunks)]
            assert "".join(pieces) == whole
            if size == 7:
                assert all(len(piece.encode()) < 10 + 2 * size for piece in pieces)


def test_a_tokenizer_that_makes_no_tokens_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 9)
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    data = make_data(tmp_path, tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    data.prepare_data()
    with pytest.raises(ValueError, match="text of 0 tokens"):
        data.setup("fit")
    Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    data = make_data(tmp_path, tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer cannot encode 'some text"):
        data.prepare_data()
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_characters_of_byte_tokens_are_streamed_whole(tmp_path: Path) -> None:
    """As of Llama's first tokenizers: a context that began within one would spoil all text behind it."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {letter: 256 + i for i, letter in enumerate("ab ")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reader = FileTokenizer(tmp_path / "tokenizer.json")
    for whole in ("日本語のテキスト", "a 𝄞𝄞𝄞𝄞 b€€€€", "éa" * 9):
        tokens = reader.encode(whole)
        assert "".join(reader.decode_stream(tokens)) == whole
        start = len(reader.encode(whole[:4]))
        assert "".join(reader.decode_stream(tokens[start:], after=tokens[:start])) == whole[4:]
