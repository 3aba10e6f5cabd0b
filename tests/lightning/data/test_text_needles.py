"""Needles in text: examples are correct, validation has other words, and lengths can exceed those in training."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from dma_lightning import NeedleDataModule, TextNeedleDataModule
from dma_lightning.cli import build_cli
from dma_lightning.cli.generate import generate
from dma_lightning.cli.positions import positions
from dma_lightning.data import IGNORE_INDEX, HaystackDataModule, InductionDataModule, SequenceDataModule
from dma_lightning.data.needles import DEPTHS
from dma_lightning.data.text_needles import (
    BOS,
    HELD_OUT_WORDS,
    PAD,
    TRAINING_WORDS,
    WORDS,
    TextNeedles,
    TextNeedleTask,
)

# Each sentence is its own; so a passage of them stands at one place of the text.
TEXT = "".join(f"Sentence {i} is here, and it goes on. " for i in range(900))
NEEDLE = re.compile(r"The code of (\w+) is (\d{6})\. ")
GOLDEN = (
    b"Sentence 831 is here, and it goes on. Sentence The code of engine is 230131. "
    b"832 is here, and it goes on. Sentence 833 isThe code of engine is 230131"
)
QUESTION = re.compile(r"The code of (\w+) is (\d{6})$")


def make_data(folder: Path, **changed: object) -> TextNeedleDataModule:
    """Small data with the text above."""
    (folder / "text.txt").write_text(TEXT)
    sizes = {"sequence_length": 480, "train_examples": 300, "val_examples": 66, "test_examples": 33}
    data = TextNeedleDataModule(str(folder / "text.txt"), cache_dir=str(folder / "cache"), **(sizes | changed))
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextNeedleDataModule:
    return make_data(tmp_path_factory.mktemp("text"))


def read(inputs: np.ndarray | torch.Tensor) -> tuple[str, list[tuple[int, str, str]], tuple[str, str] | None]:
    """Parse an example: the haystack; needles with places, words and codes; the word that is asked for; the answer."""
    first, *text = inputs.tolist()
    assert first == BOS
    whole = bytes(text).decode()
    asked = QUESTION.search(whole)
    hay, needles = whole[: asked.start()] if asked else whole, []
    while found := NEEDLE.search(hay):
        needles.append((found.start(), *found.groups()))
        hay = hay[: found.start()] + hay[found.end() :]
    return hay, needles, asked and asked.groups()


def unpadded(item: dict[str, torch.Tensor]) -> torch.Tensor:
    """Inputs of an item without padding. Checks that the padding is correct."""
    length = int((~item["padding"]).sum())
    assert not item["padding"][:length].any()
    assert (item["input_ids"][length:] == PAD).all()
    assert (item["labels"][length:] == IGNORE_INDEX).all()
    return item["input_ids"][:length]


def test_golden_example(data: TextNeedleDataModule) -> None:
    inputs, labels = data.task_at(150).generate(seed=0, length=150, depth=50)
    assert bytes(inputs[1:].tolist()) == GOLDEN
    assert labels.tolist() == [IGNORE_INDEX] * 143 + [*GOLDEN[-6:], ord(".")]
    assert inputs.dtype == labels.dtype == np.int64
    assert data.vocab_size == 258
    again = data.task_at(150).generate(seed=0, length=150, depth=50)
    assert np.array_equal(inputs, again[0])


@pytest.mark.parametrize("length", [63, 64, 111, 480, 1500])
def test_the_answer_is_the_code_of_the_word(data: TextNeedleDataModule, length: int) -> None:
    task = data.task_at(length)
    for seed in range(30):
        inputs, labels = task.generate(seed, length)
        hay, ((_, word, code),), asked = read(inputs)
        assert len(inputs) == len(labels) == length
        assert asked == (word, code)
        assert bytes(labels[-7:].tolist()).decode() == f"{code}."
        assert (labels[:-7] == IGNORE_INDEX).all()
        assert inputs[1:][-6:].tolist() == labels[-7:-1].tolist()
        assert hay in TEXT[-round(0.1 * len(TEXT)) - 1 :]
        assert hay.startswith("Sentence"[: len(hay)])


def test_the_needle_stands_at_an_end_near_its_depth(data: TextNeedleDataModule) -> None:
    for length, depth, seed in product((120, 480), (*DEPTHS, 3, 99.9), range(5)):
        hay, ((place, _, _),), _ = read(data.task_at(length).generate(seed, length, depth)[0])
        asked, most = round(depth / 100 * len(hay)), 0.05 * len(hay)
        sentences = [0, *(end.end() for end in re.finditer("[.] ", hay)), len(hay)]
        near = [end for end in sentences if abs(end - asked) <= most]
        assert abs(place - asked) <= max(most, 8)  # which is a word
        assert place in near or (not near and hay[place - 1] == " ")
        assert place == {0: 0, 100: len(hay)}.get(depth, place)


def test_text_without_sentences_has_its_needles_behind_words(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("no end " * 3000)
    task = make_data(tmp_path, val_path=str(tmp_path / "long.txt")).task_at(480)
    places = {}
    for depth in (0, 50, 100):
        hay, ((places[depth], _, _),), _ = read(task.generate(1, 480, depth)[0])
        assert depth == 100 or not places[depth] or hay[places[depth] - 1] == " "
    assert (places[0], places[100]) == (0, len(hay))
    assert abs(places[50] - len(hay) / 2) < 0.05 * len(hay)


def test_words_of_validation_are_never_in_training(data: TextNeedleDataModule) -> None:
    assert len({*WORDS}) == len(WORDS) == len(TRAINING_WORDS) + len(HELD_OUT_WORDS)
    assert not {*TRAINING_WORDS} & {*HELD_OUT_WORDS}
    told = {word for i in range(300) for _, word, _ in read(unpadded(data.train_set[i]))[1]}
    asked = {word for part in (data.val_set, data.test_set) for i in range(33) for word in read_words(part[i])}
    assert len(told) > 40
    assert len(asked) > 15
    assert told <= {*TRAINING_WORDS}
    assert asked <= {*HELD_OUT_WORDS}


def read_words(item: dict[str, torch.Tensor]) -> list[str]:
    """The words of an item's needles."""
    return [word for _, word, _ in read(unpadded(item))[1]]


def test_training_is_text_and_needles(data: TextNeedleDataModule) -> None:
    counts, lengths, first = [], set(), []
    train = TEXT[: len(TEXT) - round(0.1 * len(TEXT))]
    for i in range(300):
        item = data.train_set[i]
        inputs = unpadded(item)
        hay, needles, asked = read(inputs)
        length = len(inputs)
        assert hay in train
        assert torch.equal(item["labels"][: length - 1], inputs[1:])
        assert (item["labels"][:length] < 256).all()
        assert (item["label_bytes"].item(), item["is_answer"].item()) == (length, False)
        counts.append(len(needles))
        if not needles:
            assert (length, asked) == (480, None)
            continue
        lengths.add(length)
        assert {word: code for _, word, code in needles}[asked[0]] == asked[1]
        assert item["labels"][length - 1] == ord(".")
        assert len({word for _, word, _ in needles}) == len(needles)
        first.append(asked[0] == needles[0][1])
    assert 0.14 < np.mean(np.array(counts) > 0) < 0.26
    assert {*counts} == {0, 1, 2, 3, 4}
    assert min(lengths) < 240 < max(lengths) <= 480
    assert 0 < sum(first) < len(first)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_all_of_training_is_of_one_kind(tmp_path: Path, fraction: float) -> None:
    data = make_data(tmp_path, needle_fraction=fraction, max_needles=1, train_examples=40)
    assert {len(read_words(data.train_set[i])) for i in range(40)} == {int(fraction)}


def test_validation_goes_through_depths_and_lengths(data: TextNeedleDataModule) -> None:
    seen = []
    for i in range(66):
        item = data.val_set[i]
        inputs = unpadded(item)
        assert item["length"].item() == len(inputs)
        assert item["is_answer"].item()
        assert item["length"].dtype == item["depth"].dtype == torch.int64
        seen.append((len(inputs), item["depth"].item()))
    assert seen == 2 * [(length, depth) for length in (120, 240, 480) for depth in DEPTHS]
    assert data.answer_groups == {"length": [120, 240, 480], "depth": [*DEPTHS]}
    for part in (data.train_set, data.val_set, data.test_set):
        assert default_collate([part[i] for i in range(20)])["input_ids"].shape == (20, 480)


def test_splits_draw_from_disjoint_seeds(data: TextNeedleDataModule, tmp_path: Path) -> None:
    ranges = [range(x.first_seed, x.first_seed + len(x)) for x in (data.train_set, data.val_set, data.test_set)]
    assert len(set().union(*ranges)) == 399
    other = make_data(tmp_path, seed=1)
    assert other.fingerprint != data.fingerprint == make_data(tmp_path).fingerprint
    assert make_data(tmp_path, val_fraction=0.2).fingerprint != data.fingerprint
    assert not torch.equal(other.train_set[0]["input_ids"], data.train_set[0]["input_ids"])


def test_another_text_for_validation(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("Another book has other words. " * 40)
    data = make_data(tmp_path, val_path=str(tmp_path / "val.txt"), train_examples=900)
    assert all("book" in read(unpadded(data.val_set[i]))[0] for i in range(11, 33))
    hays = [read(unpadded(data.train_set[i]))[0] for i in range(900)]
    assert all(hay in TEXT for hay in hays)
    assert any(f"Sentence {i} is" in hay for hay in hays for i in range(850, 890))  # of the end, which trains, too


def test_haystacks_as_long_as_the_text(data: TextNeedleDataModule) -> None:
    size = round(0.1 * (len(TEXT) + 1))
    assert len(data.task_at(size).generate(0, size, 100)[0]) == size
    with pytest.raises(
        ValueError,
        match=rf"at least {size + 1} bytes of validation text for examples of {size + 1} tokens, got {size}; give more",
    ):
        data.task_at(size + 1)
    with pytest.raises(ValueError, match="sequence_length: expected at least 63 for a question and up to 1 needles"):
        data.task_at(62)


@pytest.mark.parametrize("kind", [NeedleDataModule, TextNeedleDataModule])
def test_what_evaluation_may_ask_for(kind: type[HaystackDataModule]) -> None:
    assert issubclass(kind, HaystackDataModule)
    assert not issubclass(InductionDataModule, HaystackDataModule)
    assert not HaystackDataModule.is_complete()
    with pytest.raises(TypeError, match="abstract"):
        HaystackDataModule()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 62, "max_needles": 1}, "sequence_length: expected at least 63 for a question and up to 1"),
        (
            {"sequence_length": 100},
            "sequence_length: expected at least 159 for a question and up to 4 needles, got 100",
        ),
        ({"max_needles": 0}, "max_needles: expected from 1 to 96, a word for each, got 0"),
        ({"max_needles": 97}, "max_needles: expected from 1 to 96, a word for each, got 97"),
        ({"needle_fraction": -0.1}, "needle_fraction: expected a share from 0 to 1, got -0.1"),
        ({"needle_fraction": 1.5}, "needle_fraction: expected a share from 0 to 1, got 1.5"),
        ({"val_fraction": 0.0}, "val_fraction: expected a share between 0 and 1, got 0.0"),
        ({"val_examples": 0}, "expected at least one example in each split"),
        (
            {"val_fraction": 0.001},
            "at least 480 bytes of validation text for examples of 480 tokens, got 34; give more",
        ),
        ({"val_fraction": 0.999}, "at least 480 bytes of training text for examples of 480 tokens, got 34; give more"),
        ({"val_path": "nowhere/*.txt"}, "path: expected a text file, a folder with files or a glob that matches, got"),
    ],
)
def test_impossible_needles(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(tmp_path, **changed)


@pytest.mark.parametrize("name", ["path", "val_path", "cache_dir"])
def test_files_are_not_taken_from_a_stranger(name: str, tmp_path: Path) -> None:
    arguments = {"_class_path": "dma_lightning.TextNeedleDataModule", "sequence_length": 300, name: "secret"}
    torch.save({"datamodule_hyper_parameters": arguments}, tmp_path / "strange.ckpt")
    for kind in (TextNeedleDataModule, SequenceDataModule):
        with pytest.raises(ValueError, match=rf"strange\.ckpt: expected files .* got {{'{name}': 'secret'}}"):
            kind.load_from_checkpoint(tmp_path / "strange.ckpt")
    data = TextNeedleDataModule.load_from_checkpoint(tmp_path / "strange.ckpt", **{name: str(tmp_path)})
    assert data.sequence_length == 300


def test_other_processes_draw_the_same(data: TextNeedleDataModule, tmp_path: Path) -> None:
    workers = make_data(tmp_path, num_workers=1, batch_size=33)
    (batch, _) = workers.val_dataloader()
    assert torch.equal(batch["input_ids"], torch.stack([data.val_set[i]["input_ids"] for i in range(33)]))


def test_needles_of_a_form_and_a_text_make_a_task(data: TextNeedleDataModule) -> None:
    form = TextNeedles(300, ("one", "two", "three"), max_needles=3)
    task = TextNeedleTask(form, data.text.part("all"))
    assert (task.least_length, task.sequence_length) == (28 + 3 * 29, 300)
    counts = {len(read(task.generate(seed, depth=50)[0])[1]) for seed in range(30)}
    assert counts == {1, 2, 3}
    lengths = [len(task.generate(seed)[0]) for seed in range(200)]
    assert 115 <= min(lengths) < 125
    assert 290 < max(lengths) <= 300


def test_a_model_trains_on_them_and_reads_other_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [f"--config={Path(__file__).parents[3] / 'configs' / x}.yaml" for x in ("model/mqar", "data/text-needles")]
    small = ["--data.sequence_length=256", "--data.batch_size=4", "--data.val_examples=33", "--trainer.max_steps=2"]
    trainer = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cache = f"--data.cache_dir={tmp_path / 'cache'}"
    cli = build_cli(["fit", *layers, *small, *trainer, cache, "--trainer.val_check_interval=2"])
    figures = cli.trainer.callback_metrics
    assert cli.model.model.config.vocab_size == 258
    assert 0 <= figures["val/answers"] <= figures["val/accuracy"] < 1
    assert torch.isfinite(figures["val/loss"])
    for group in ("length_64", "length_128", "length_256", "depth_0", "depth_100"):
        assert 0 <= figures[f"val/answers/{group}"] < 1
    assert "val/bits_per_byte" not in figures
    checkpoint, text = str(next(tmp_path.rglob("*.ckpt"))), tmp_path / "text.txt"
    text.write_text("alpha beta gamma delta\n" * 20)
    positions(Path(checkpoint), str(text), length=128, device="cpu")
    generate(Path(checkpoint), prompt=["The "], max_new_tokens=2, device="cpu")
    assert re.search(r"bits per byte(.|\n)*\bThe ", capsys.readouterr().out)
