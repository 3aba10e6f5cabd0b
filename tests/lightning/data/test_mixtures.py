"""Training on several prepared folders with weights: shares, order, resuming, and what cannot be mixed."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from prepared_folders import write_corpus
from small_texts import special_tokenizer, write_tokenizer
from test_resume_data import BATCH, fit, fresh, interrupted

from dma_lightning import LanguageModel, PreparedDataModule
from dma_lightning.cli.prepare import prepare
from dma_lightning.data.mixtures import Mixture
from dma_lightning.data.samplers import TrainSampler

SIZES = (50, 30, 7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with 50, 30 and 7 training windows of 8 digits. Each folder has its own digits."""
    root = tmp_path_factory.mktemp("folders")
    random = np.random.default_rng(0)
    for name, windows, digits in zip("abc", SIZES, ("0123", "456", "789"), strict=True):
        validation = 16
        (root / f"{name}.txt").write_text("".join(random.choice(list(digits), windows * 8 + 2 + validation)))
        prepare(str(root / f"{name}.txt"), root / name, processes=1)
    return {name: str(root / name) for name in "abc"}


def make(path: str | dict[str, float], **changed: int) -> PreparedDataModule:
    """Windows of 8 tokens; the last 16 tokens or more of each folder are for validation."""
    return PreparedDataModule(path, **({"sequence_length": 8, "batch_size": BATCH, "val_fraction": 0.04} | changed))


def named(folders: dict[str, str], *weights: float) -> dict[str, float]:
    return {folders[name]: weight for name, weight in zip("abc", weights, strict=False)}


def drawn(data: PreparedDataModule, epoch: int = 0) -> list[tuple[int, ...]]:
    """The sequences of an epoch, in order."""
    data.setup("fit")
    assert data.train_mixture is not None
    return [tuple(data.train_set[i]["input_ids"].tolist()) for i in data.train_mixture.order(0, epoch)]


def source(sequence: tuple[int, ...]) -> str:
    """The folder that a sequence comes from."""
    digits = set(bytes(sequence).decode())
    (name,) = (name for name, own in zip("abc", ("0123", "456", "789"), strict=True) if digits <= set(own))
    return name


@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3), (0.2, 0.5, 0.3), (1, 1e-2), (1e-300, 1e-300), (5,)])
def test_an_epoch_has_the_shares_that_weights_say(folders: dict[str, str], weights: tuple[float, ...]) -> None:
    data = make(named(folders, *weights))
    for epoch in (0, 3):
        sequences = drawn(data, epoch)
        assert len(sequences) == len(data.train_set)
        found = Counter(map(source, sequences))
        for name, weight in zip("abc", weights, strict=False):
            assert abs(found[name] - len(sequences) * weight / sum(weights)) <= 1


@pytest.mark.parametrize("counts", [(60, 20, 7), (20, 60, 7), (50, 30, 7), (1, 1, 85)])
def test_no_sequence_comes_twice_before_all_of_its_source_have_come(counts: tuple[int, ...]) -> None:
    """Over epochs; of all times that any two sequences of a source came, the numbers differ by one at most."""
    mixture, borders = Mixture(("a", "b", "c"), SIZES, counts), np.cumsum([0, *SIZES])
    times = np.zeros(sum(SIZES), int)
    for epoch in range(9):
        order = mixture.order(5, epoch)
        np.add.at(times, order, 1)
        for i, (first, stop) in enumerate(pairwise(borders)):
            assert np.count_nonzero((order >= first) & (order < stop)) == counts[i]
            assert np.ptp(times[first:stop]) <= 1


def test_seed_and_epoch_alone_decide_the_order() -> None:
    mixture = Mixture(("a", "b"), (50, 30), (40, 40))
    assert np.array_equal(mixture.order(1, 2), Mixture(("x", "y"), (50, 30), (40, 40)).order(1, 2))
    orders = [mixture.order(seed, epoch) for seed, epoch in ((1, 2), (1, 3), (2, 2))]
    assert len({tuple(order) for order in orders}) == 3
    passes = [mixture._drawn(source, 1, 0) for source in (0, 1)]
    assert not np.array_equal(passes[0][passes[0] < 30][:20], passes[1][:20])
    early = np.mean([np.count_nonzero(mixture.order(seed, 0)[:20] < 50) for seed in range(200)])
    assert abs(early - 10) < 5 * math.sqrt(20 / 4 / 200)  # the sources are shuffled together


def test_a_single_folder_has_the_order_that_it_always_had(folders: dict[str, str]) -> None:
    data = make(folders["a"])
    data.setup("fit")
    assert data.train_mixture is None
    expected = np.random.default_rng((0, 0)).permutation(50)[:48].reshape(12, 4)
    batches = [batch["input_ids"] for batch in data.train_dataloader()]
    for batch, indices in zip(batches, expected, strict=True):
        assert torch.equal(batch, torch.stack([data.train_set[i]["input_ids"] for i in indices]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_the_batches_of_one(ranks: int) -> None:
    order = Mixture(("a", "b"), (60, 40), (30, 70)).order
    one = TrainSampler(100, 12, seed=3, order=order)
    parts = [TrainSampler(100, 12 // ranks, ranks, rank, seed=3, order=order) for rank in range(ranks)]
    whole = np.array(list(one)).reshape(8, 12)
    shared = np.concatenate([np.array(list(part)).reshape(8, -1) for part in parts], axis=1)
    assert np.array_equal(whole, shared)
    assert np.array_equal(whole.ravel(), order(3, 0)[:96])


@pytest.mark.parametrize("fail_at", [4, 19, 27])
def test_going_on_equals_not_being_interrupted(fail_at: int, folders: dict[str, str], tmp_path: Path) -> None:
    """Within the first epoch of 20 batches, at its end, and in the next; with other workers."""
    weights = named(folders, 0.3, 0.7)
    model, _ = fit(tmp_path, make(weights), fresh())
    assert Counter(source(x[:8]) for x, _ in model.seen).keys() == {"a", "b"}
    checkpoint = interrupted(tmp_path, make(weights, num_workers=2), fail_at, "training_step")
    resumed, _ = fit(tmp_path, make(weights, num_workers=1), fresh(), checkpoint)
    assert resumed.seen == model.seen[fail_at:]
    assert torch.equal(resumed.embedding.weight, model.embedding.weight)


def test_a_checkpoint_within_an_epoch_keeps_to_its_shares(folders: dict[str, str], tmp_path: Path) -> None:
    """Not to the order of the names, nor to the sum of the weights, nor to where the folders are."""
    model, _ = fit(tmp_path, make(named(folders, 0.3, 0.7)), fresh())
    checkpoint = interrupted(tmp_path, make(named(folders, 0.3, 0.7)), 4, "training_step")
    (tmp_path / "moved").symlink_to(folders["a"])
    same = {folders["b"]: 7, str(tmp_path / "moved"): 3}
    assert fit(tmp_path, make(same), fresh(), checkpoint)[0].seen == model.seen[4:]
    for other in (named(folders, 0.31, 0.69), named(folders, 0.7, 0.3)):
        with pytest.raises(ValueError, match=r"expected its training data \(.*\), got other data"):
            fit(tmp_path, make(other), fresh(), checkpoint)
    end = interrupted(tmp_path / "end", make(named(folders, 0.3, 0.7)), 19, "on_train_batch_end")
    fit(tmp_path, make(named(folders, 0.7, 0.3)), fresh(), end)


def test_validation_has_the_ends_of_all_folders(folders: dict[str, str]) -> None:
    data = make(named(folders, 0.2, 0.5, 0.3), val_fraction=0.2)
    data.setup("fit")
    val = [tuple(data.val_set[i]["input_ids"].tolist()) for i in range(len(data.val_set))]
    assert Counter(map(source, val)) == {"a": 10, "b": 6, "c": 1}  # by size, not by weight
    other = make(named(folders, 0.2, 0.5), val_path=folders["c"])
    other.setup("fit")
    assert {source(tuple(other.val_set[i]["input_ids"].tolist())) for i in range(len(other.val_set))} == {"c"}
    assert len(other.train_set) > 80  # all of both folders


def test_bytes_per_token_are_those_of_the_shares(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.json")
    for name, text in (("a", "the of the is to the " * 99), ("b", "Größe 𝄞 " * 99)):
        (tmp_path / f"{name}.txt").write_text(text)
        prepare(str(tmp_path / f"{name}.txt"), tmp_path / name, str(tmp_path / "t.json"), processes=1)
    one, two = (make(str(tmp_path / name)).bytes_per_token for name in "ab")
    assert one > 1.2 * two
    mixed = make({str(tmp_path / "a"): 1, str(tmp_path / "b"): 3})
    assert mixed.bytes_per_token == pytest.approx((one + 3 * two) / 4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"expected a folder, or folders with weights such as {web: 0\.7, books: 0\.3}, got none"),
        ({"a": 0.0, "b": 1.0}, "expected a positive weight for a, got 0.0; leave out unused folders"),
        ({"a": 1.0, "b": -0.5}, "expected a positive weight for b, got -0.5"),
        ({"a": math.nan}, "expected a positive weight for a, got nan"),
        ({"a": math.inf}, "expected a positive weight for a, got inf"),
        ({"a": True}, "expected a positive weight for a, got True"),
        ({"a": "x"}, "expected a positive weight for a, got 'x'"),
        ({"a": 1.0, "a/": 2.0}, "expected each folder once, got 'a', 'a/'; add up its weights"),
        ("{a:0.7,b:0.3}", r"expected a folder, or .*, got '{a:0\.7,b:0\.3}'; put a space after each colon"),
        ({"nowhere": 1.0}, "nowhere: expected a folder made by `dma-lightning prepare`, got no manifest"),
    ],
)
def test_weights_that_make_no_mixture(weights: dict[str, float] | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(weights)


def test_a_weight_too_small_for_one_sequence_is_told(folders: dict[str, str]) -> None:
    data = make(named(folders, 1, 1e-4))
    with pytest.raises(ValueError, match=rf"one of the 80 sequences of an epoch, got none for {folders['b']}; raise"):
        data.setup("fit")


def test_a_folder_without_a_sequence_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    prepare(str(tmp_path / "short.txt"), tmp_path / "short", processes=1)
    data = make({folders["a"]: 1, str(tmp_path / "short"): 1})
    with pytest.raises(ValueError, match=r"8 tokens in the training part .* got at most 5 in 1 shards at .*short;"):
        data.setup("fit")


def test_tokens_must_be_made_in_the_same_way(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    one, other = tmp_path / "one.json", special_tokenizer(tmp_path / "other.json")
    write_tokenizer(one)

    def prepared(name: str, tokenizer: Path | str | None, text: str = "text", **options: object) -> str:
        given = tokenizer and str(tokenizer)
        prepare(str(tmp_path / text), tmp_path / name, given, processes=1, **options)
        return str(tmp_path / name)

    first = prepared("first", one, eos_token_id=3)
    for name, tokenizer, options, message in (
        ("bytes", None, {"eos_token_id": 3}, "path: expected a folder with the tokenizer of .*first, got .*bytes with"),
        ("eos", one, {}, "path: expected folders with eos_token_id 3, as .*first, got .*eos with None; prepare it in"),
    ):
        with pytest.raises(ValueError, match=message):
            make({first: 1, prepared(name, tokenizer, **options): 1})
    (tmp_path / "spelled.txt").write_text("a <end> a a " * 9)
    kinds = [prepared(f"as-{x}", other, "spelled.txt", special_tokens=x) for x in ("text", "parse")]
    with pytest.raises(ValueError, match=r"path: expected a folder with special_tokens 'text', .* got .* with 'parse'"):
        make({kinds[0]: 1, kinds[1]: 1})
    with pytest.raises(ValueError, match=r"val_path: .* the tokenizer of .*first, got .*as-text with"):
        make({first: 1}, val_path=kinds[0]).setup("fit")


def test_folders_of_version_1_are_not_mixed_with_others(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.json")
    write_corpus(tmp_path / "text")
    for name in ("old", "new"):
        prepare(str(tmp_path / "text"), tmp_path / name, str(tmp_path / "t.json"), processes=1)
    manifest = json.loads((tmp_path / "old/manifest.json").read_text())
    for shard in manifest["shards"]:
        del shard["lengths_dtype"], shard["lengths_sha256"]
    (tmp_path / "old/manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    for weights in ({"old": 1, "new": 1}, {"new": 1, "old": 1}):
        with pytest.raises(ValueError, match=r"that know the bytes of their tokens, got .*old of version 1; prepare"):
            make({str(tmp_path / name): weight for name, weight in weights.items()})


def test_the_command_mixes_and_goes_on_within_an_epoch(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the weights of the checkpoint, unless others are given; and with those of a config."""
    monkeypatch.chdir(tmp_path)
    seen: list[list] = []
    monkeypatch.setattr(
        LanguageModel,
        "on_train_batch_start",
        lambda self, batch, *_: seen.append(batch["input_ids"].tolist()),
        raising=False,
    )
    data = ["--data=PreparedDataModule", "--data.sequence_length=8", "--data.batch_size=4", "--data.val_fraction=0.04"]
    mixed = f"--data.path={{{folders['a']}: 1, {folders['b']}: 3}}"
    run = ["--run_summary.init_args={}", *small_run.MODEL, *data, mixed]
    small_run.fit("--trainer.max_steps=9", *run, "--trainer.logger.name=whole")
    printed = capsys.readouterr().out
    assert f"data         0.25 of {folders['a']} (0.4 passes per epoch), 0.75 of {folders['b']} (2 passes" in printed
    whole = seen.copy()
    small_run.fit("--trainer.max_steps=4", *run)
    seen.clear()
    checkpoint = f"--ckpt_path={small_run.CHECKPOINTS}/last.ckpt"
    rest = small_run.fit("--trainer.max_steps=9", checkpoint)
    assert rest.datamodule.weights == {Path(folders["a"]): 1.0, Path(folders["b"]): 3.0}
    assert seen == whole[4:]
    assert small_run.validate(f"{small_run.CHECKPOINTS}/last.ckpt").datamodule.weights == rest.datamodule.weights
    with pytest.raises(ValueError, match="expected its training data"):
        small_run.fit("--trainer.max_steps=9", checkpoint, mixed.replace("3}", "2}"))
    Path("strange.ckpt").write_bytes(Path(f"{small_run.CHECKPOINTS}/last.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"data\.path: expected a path that you name, since .* names {'.*a': 1\.0, "):
        small_run.validate("strange.ckpt")
    Path("c.yaml").write_text(json.dumps({"data": {"init_args": {"path": named(folders, 1, 3)}}}))
    seen.clear()
    small_run.fit("--trainer.max_steps=2", *run[1:-1], "--config=c.yaml", "--trainer.logger.name=config")
    assert seen == whole[:2]
