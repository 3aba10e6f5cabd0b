"""Tokens and the bytes that each completes, against an oracle that does not use offsets; files that are refused."""

import copy
import json
import os
import pickle
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from small_texts import special_tokenizer, write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dma_lightning.tokenizers import FileTokenizer

Oracle = tuple[FileTokenizer, Callable[[str], str], Callable[[str], str]]


def byte_level() -> Oracle:
    """A tokenizer whose characters are bytes. Its post-processor would move ends of tokens away from white space."""
    write_tokenizer(Path("tokenizer.json"))
    tokenizer = Tokenizer.from_file("tokenizer.json")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    return FileTokenizer.of_json(tokenizer.to_str()), lambda x: split(x)[0][0], str


def byte_fallback() -> Oracle:
    """A tokenizer that writes unknown characters as bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        letter: 256 + i for i, letter in enumerate("ab Ae")
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def expand(x: str) -> str:
        return x if x in vocabulary else "".join(f"<0x{byte:02X}>" for byte in x.encode())

    return FileTokenizer.of_json(tokenizer.to_str()), expand, str


def metaspace() -> Oracle:
    """A tokenizer in which a space belongs to the word after it."""
    letters = sorted(set("▁" + TEXT.replace(" ", "")))
    merges = [("▁", "a"), ("▁a", "b"), ("▁", "é")]
    vocabulary = {x: i for i, x in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return FileTokenizer.of_json(tokenizer.to_str()), lambda x: x.replace(" ", "▁"), str


def word_piece() -> Oracle:
    """A tokenizer of lower-case letters without accents. It drops white space, control characters and marks."""

    def expand(x: str) -> str:
        kept = (y for y in unicodedata.normalize("NFD", x) if unicodedata.category(y) not in ("Mn", "Cc", "Zs", "Cf"))
        return "".join(kept).lower()

    letters = sorted({y for x in TEXT for y in expand(x)})
    vocabulary = {x: i for i, x in enumerate(["[UNK]", "ab", *letters, *(f"##{x}" for x in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=1000))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return FileTokenizer.of_json(tokenizer.to_str()), expand, lambda x: x.removeprefix("##")


def unigram() -> Oracle:
    """A tokenizer that normalizes to compatible forms. Some have several characters, and tokens may end inside them."""

    def expand(x: str) -> str:
        return unicodedata.normalize("NFKC", x).lower()

    letters = sorted({y for x in TEXT for y in expand(x)})
    pieces = [("<unk>", 0.0), ("ab", -1.0), ("a ", -1.0), *((x, -2.0) for x in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return FileTokenizer.of_json(tokenizer.to_str()), expand, str


TEXT = "abAB aab,  é ﬁ½Ⅷ 日本𝄞ßÄ"
MARKED = TEXT + "\t\n\x01\u0301\u200d"  # with what some tokenizers drop


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, metaspace, word_piece, unigram])
def test_ends_are_those_of_an_oracle_without_offsets(
    kind: Callable[[], Oracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each character of the source becomes others, of which tokens are made in order."""
    monkeypatch.chdir(tmp_path)
    tokenizer, expand, spelled = kind()
    letters = MARKED if kind in (byte_level, byte_fallback, word_piece) else TEXT
    for seed in range(30):
        text = "".join(random.Random(seed).choices(letters, k=seed * 3))
        position, stream = 0, []
        for character in text:
            position += len(character.encode())
            stream += [(x, position) for x in expand(character)]
        ids, ends = tokenizer.encode_with_ends(text)
        assert ids.tolist() == tokenizer.encode(text)
        left, expected = iter(stream), []
        for token in map(tokenizer.tokenizer.id_to_token, ids):
            taken = [next(left) for _ in spelled(token)]
            assert "".join(x for x, _ in taken) == spelled(token)
            expected.append(taken[-1][1])
        assert ends.tolist() == expected
        assert next(left, None) is None


def test_bytes_that_are_no_utf8_are_one_byte_each(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    data = b"\xff\xe2\x82 \xc3\xa9\xed\xa0\x80x\xf0\x9d"
    ids, ends = tokenizer.encode_with_ends(data.decode(errors="surrogateescape"))
    shown = "\ufffd\ufffd\ufffd é\ufffd\ufffd\ufffdx\ufffd\ufffd"
    assert ids.tolist() == tokenizer.encode(shown)
    _, whole = tokenizer.encode_with_ends(shown)
    sizes = dict(zip([3, 6, 9, 10, 12, 15, 18, 21, 22, 25, 28], [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12], strict=True))
    assert ends.tolist() == [sizes[end] for end in whole.tolist()]
    assert ends[-1] == len(data)


def test_a_post_processor_is_carried_along_though_it_is_not_used(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[CLS]": 1}, unk_token="a"))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    reader = FileTokenizer.of_json(tokenizer.to_str())
    assert reader.encode("a") == [0]
    assert json.loads(reader.to_json()) == json.loads(tokenizer.to_str())


@pytest.mark.parametrize(("option", "tokens"), [("text", [1, 2, 3, 4]), ("parse", [1, 5])])
def test_copies_encode_as_the_original(option: str, tokens: list[int], tmp_path: Path) -> None:
    """Also in processes that are spawned, which get pickled ones."""
    tokenizer = FileTokenizer(special_tokenizer(tmp_path / "tokenizer.json"), option)
    for reader in (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert (reader.encode("a <end>"), reader.special_tokens, reader.to_json()) == (
            tokens,
            option,
            tokenizer.to_json(),
        )


def test_an_unknown_way_with_special_tokens_is_told(tmp_path: Path) -> None:
    path = special_tokenizer(tmp_path / "tokenizer.json")
    for make in (lambda: FileTokenizer(path, "both"), lambda: FileTokenizer.of_json(Path(path).read_text(), "both")):
        with pytest.raises(ValueError, match=r"^special_tokens: expected one of \('text', 'parse'\), got 'both'"):
            make()


MODEL = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
BAD = [
    ({"model": MODEL | {"vocab": {"a": 1 << 31}}}, r"`int` <= 16777215 - at `\$\.model\.vocab"),
    ({"model": MODEL | {"vocab": {"a": 1 << 24}}}, r"`int` <= 16777215 - at `\$\.model\.vocab"),
    ({"model": MODEL | {"vocab": {"a": -1}}}, r"`int` >= 0 - at `\$\.model\.vocab"),
    ({"model": MODEL | {"vocab": {"a": "0"}}}, r"Expected `int`, got `str` - at `\$\.model\.vocab"),
    ({"added_tokens": [{"id": 1 << 40, "content": "b"}]}, r"`int` <= 16777215 - at `\$\.added_tokens\[0\]\.id"),
    ({"added_tokens": [{"content": "b"}]}, r"missing required field `id` - at `\$\.added_tokens\[0\]"),
    ({"model": MODEL | {"merges": [["a", "a"]]}}, r"tokenizer\.json: expected a tokenizer\.json of the library"),
    (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        r"expected a tokenizer\.json of the library",
    ),
    ({"model": None}, r"Expected `object`, got `null` - at `\$\.model"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_damaged_files_are_told_in_one_line(change: dict, message: str, tmp_path: Path) -> None:
    """Also where the library panics, or would take memory for ids that nobody needs."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": MODEL} | change))
    with pytest.raises(ValueError, match=message) as told:
        FileTokenizer(path)
    assert str(told.value).startswith(f"{path}: expected a tokenizer.json of the library tokenizers: ")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"expected the content of a tokenizer\.json, got something else: "):
        FileTokenizer.of_json(path.read_text())


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(ValueError, match=r"expected a tokenizer\.json of the library tokenizers, got"):
            FileTokenizer(tmp_path / name)


def test_a_panic_while_encoding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """A stand-in for the library's exception."""

    class Panicking:
        def encode(self, *_: object, **__: object) -> None:
            raise PanicException("index out of\nbounds")

    tokenizer = FileTokenizer.of_json(json.dumps({"version": "1.0", "added_tokens": [], "model": MODEL}))
    tokenizer.tokenizer = Panicking()
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode 'text'\.\.\.: index out of bounds"):
        tokenizer.encode("text")
    monkeypatch.setattr(Panicking, "encode", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode_with_ends("text")
