"""Loss, perplexity and bits per byte of a split cover all its labels, whatever the precision, and a NaN shows."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dma_lightning import LanguageModel
from dma_lightning.data import IGNORE_INDEX, NeedleDataModule
from dma_lightning.data.samplers import EvalSampler, PaddedDataset
from dma_lightning.metrics import AnswerAccuracy, BitsPerByte, EvaluationMetrics, MeanLoss, Perplexity


class Sequences(Dataset):
    """Random sequences with labels in their first part. One in five has no labels."""

    def __init__(self, count: int, **fields: Tensor) -> None:
        self.count, self.fields = count, fields

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 64, (33,), generator=torch.Generator().manual_seed(index))
        labels = ids[1:].clone()
        labels[8 * (index % 5) :] = IGNORE_INDEX
        size = {"label_bytes": torch.tensor(16 * (index % 5))}  # two for each
        return {"input_ids": ids[:-1], "labels": labels} | size | {name: x[index] for name, x in self.fields.items()}


def small_model(**options: object) -> LanguageModel:
    """A one-layer model, with weights far from those that give every token the same loss."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 64, "max_position_embeddings": 32, "num_key_value_heads": 1, "keep_window_size": 8}
    return LanguageModel(**sizes, **tokens, initializer_range=0.3, schedule="constant", **options)


def quiet_trainer(**options: object) -> pl.Trainer:
    """A trainer without files and output."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


def test_sums_are_compensated() -> None:
    metric, total = MeanLoss(), 0.0
    for value in (0.1 + 1e-3 * torch.rand(20_000, dtype=torch.float64)).float():
        metric.update(value, torch.tensor(3))
        total += value.double().item()
    assert metric.compute().item() == pytest.approx(total / 60_000, rel=1e-7)


@pytest.mark.parametrize("kind", [MeanLoss, Perplexity, BitsPerByte])
def test_a_nan_shows(kind: type[MeanLoss]) -> None:
    metric = kind()
    for value in (1.0, math.nan, 1.0):
        metric.update(torch.tensor(value), torch.tensor(4))
    assert metric.compute().isnan()


@pytest.mark.parametrize("kind", [MeanLoss, Perplexity, BitsPerByte])
def test_infinities_show(kind: type[MeanLoss]) -> None:
    metric = kind()
    for value in (1.0, math.inf, 1.0):
        metric.update(torch.tensor(value), torch.tensor(4))
    assert metric.compute() == math.inf


def test_figures_of_nothing_are_not_known() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor(3.0), torch.tensor(0))  # end tokens alone
    assert metric.compute().isnan()


def test_bits_per_byte_are_left_out_where_nobody_knows_the_bytes() -> None:
    class Unknown(Sequences):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            item = super().__getitem__(index)
            del item["label_bytes"]
            return item

    found = quiet_trainer().validate(small_model(bytes_per_token=4.9), DataLoader(Unknown(4)), verbose=False)[0]
    assert set(found) == {"val/loss", "val/perplexity", "val/accuracy"}


def test_perplexity_is_that_of_the_mean() -> None:
    metric = Perplexity()
    metric.update(torch.tensor(255.0), torch.tensor(3))  # each token's probability is below the smallest float
    metric.update(torch.tensor(1.0), torch.tensor(1))
    assert metric.compute().item() == pytest.approx(math.exp(64), rel=1e-4)


def test_bits_per_byte() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor(60.0), torch.tensor(110))
    metric.update(torch.tensor(30.0), torch.tensor(10))
    assert metric.compute().item() == pytest.approx(90 / 120 / math.log(2))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"])
def test_figures_do_not_depend_on_the_dtype_of_the_model(precision: str) -> None:
    module, trainer = small_model(), quiet_trainer(precision=precision)
    loader = DataLoader(Sequences(300), batch_size=1)
    found = trainer.validate(module, loader, verbose=False)[0]
    nats = labels = right = 0
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in loader:
            _, totals = module._loss(batch)
            nats += totals.nats.double().item()
            labels += totals.labels.item()
            right += (module(batch["input_ids"]).argmax(-1) == batch["labels"]).sum().item()
    assert found["val/loss"] == pytest.approx(nats / labels, rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-5)
    assert found["val/bits_per_byte"] == pytest.approx(nats / labels / 2 / math.log(2), rel=1e-6)
    assert found["val/accuracy"] == pytest.approx(right / labels, rel=1e-6)


def test_bits_per_byte_take_the_bytes_of_the_labels() -> None:
    sizes = torch.arange(30) ** 2
    module = small_model()
    loader = DataLoader(Sequences(30, label_bytes=sizes), batch_size=4)
    found = quiet_trainer().test(module, loader, verbose=False)[0]
    nats = sum(module._loss(batch)[1].nats.item() for batch in loader)
    assert found["test/bits_per_byte"] == pytest.approx(nats / sizes.sum().item() / math.log(2), rel=1e-6)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_nan_in_one_batch_shows_in_all_losses(split: str) -> None:
    module = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        module.model.embed_tokens.weight[Sequences(8)[6]["input_ids"][0]] = math.nan
    run = {"val": quiet_trainer().validate, "test": quiet_trainer().test}[split]
    found = run(module, DataLoader(Sequences(8), batch_size=2), verbose=False)[0]
    assert all(math.isnan(found[f"{split}/{name}"]) for name in ("loss", "perplexity", "bits_per_byte"))


def test_an_answer_is_right_as_a_whole() -> None:
    labels = torch.tensor([[-100, 1, 2], [1, -100, 2], [3, 3, -100], [-100, -100, -100], [1, 1, 1]])
    predictions = torch.tensor([[9, 1, 2], [1, 9, 1], [3, 3, 3], [1, 2, 3], [1, 1, 1]])
    answers = AnswerAccuracy()
    answers.update(predictions, labels, torch.tensor([True, True, True, True, False]))
    assert answers.compute().item() == pytest.approx(2 / 3)  # the fourth has no label, the fifth is none
    answers.update(predictions[1:2], labels[1:2], torch.tensor([True]))
    assert answers.compute().item() == 0.5
    answers.reset()
    assert answers.compute().isnan()


def test_answers_are_told_apart_by_the_groups_of_the_data() -> None:
    labels = torch.tensor([[-100, 1, 2], [-100, 3, 4], [-100, 5, 6], [-100, 7, 7]])
    said = torch.tensor([[0, 1, 2], [0, 3, 3], [0, 5, 6], [0, 7, 7]])
    fields = {
        "length": torch.tensor([16, 16, 32, 32]),
        "depth": torch.tensor([0, 50, 50, 0]),
        "is_answer": torch.tensor([True, True, True, False]),
    }
    items = [{"labels": row} | {name: x[i] for name, x in fields.items()} for i, row in enumerate(labels)]
    padded = PaddedDataset(items, IGNORE_INDEX)
    metrics = EvaluationMetrics(8)
    metrics.split_answers({"length": [8], "other": [1]})  # of other data, before
    metrics.split_answers({"length": [16, 32, 64], "depth": [0, 50]})
    for part in ((0, 1), (2, 3), (4, 5)):  # the last two sequences are padding
        batch = torch.utils.data.default_collate([padded[i] for i in part])
        predictions = said[torch.tensor(part) % 4]
        found = dict(metrics.add(batch, predictions, torch.tensor(1.0), torch.tensor(2)))
    figures = {name: metric.compute().item() for name, metric in found.items() if name.startswith("answers")}
    assert math.isnan(figures.pop("answers/length_64"))
    assert figures == {
        "answers": pytest.approx(2 / 3),
        "answers/length_16": 0.5,
        "answers/length_32": 1,
        "answers/depth_0": 1,
        "answers/depth_50": 0.5,
    }
    assert not metrics.state_dict()


def test_batches_without_groups_report_none() -> None:
    metrics = EvaluationMetrics(8)
    metrics.split_answers({"length": [16]})
    batch = {"labels": torch.tensor([[1, 2]]), "is_answer": torch.tensor([True])}
    found = dict(metrics.add(batch, batch["labels"], torch.tensor(1.0), torch.tensor(2)))
    assert set(found) == {"loss", "perplexity", "accuracy", "answers"}


def test_a_model_reports_the_groups_of_each_data_that_it_meets() -> None:
    module = small_model()
    weights = set(module.state_dict())
    symbols = {"key_symbols": 8, "value_symbols": 8, "filler_symbols": 8, "key_length": 1, "value_length": 1}
    plain = {"loss", "perplexity", "accuracy", "answers"}
    depths = {f"answers/depth_{depth}" for depth in range(0, 101, 10)}
    for length, lengths in ((20, (9, 10, 20)), (32, (9, 16, 32))):  # the least is 9
        data = NeedleDataModule(length, **symbols, train_examples=4, val_examples=33, test_examples=5, batch_size=4)
        trainer = quiet_trainer(max_steps=1)
        trainer.fit(module, data)
        expected = plain | depths | {f"answers/length_{x}" for x in lengths}
        assert set(trainer.callback_metrics) >= {f"val/{name}" for name in expected}
        found = trainer.test(module, data, verbose=False)[0]
        assert set(found) == {f"test/{name}" for name in expected}
        assert math.isnan(found["test/answers/depth_50"])  # five examples reach 40
        assert found["test/answers/depth_40"] in (0, 1)
    assert set(module.state_dict()) == weights
    found = quiet_trainer().validate(module, DataLoader(Sequences(4)), verbose=False)[0]
    assert set(found) == {"val/loss", "val/perplexity", "val/accuracy", "val/bits_per_byte"}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_answers_of_all_processes_are_those_of_the_data(ranks: int) -> None:
    """Of 35 examples, a number that two and three do not divide: what fills up counts in no group."""
    data = NeedleDataModule(32, 2, 1, 2, key_length=1, value_length=1, val_examples=35)
    data.setup("validate")
    counts: dict[str, Tensor] = {}
    for rank in range(ranks):
        metrics = EvaluationMetrics(data.vocab_size)
        metrics.split_answers(data.answer_groups)
        for index in EvalSampler(35, ranks, rank):
            batch = torch.utils.data.default_collate([PaddedDataset(data.val_set, IGNORE_INDEX)[index]])
            said = torch.full((1, 32), 8)  # the only value
            found = dict(metrics.add(batch, said, torch.tensor(1.0), torch.tensor(1)))
        for name, metric in found.items():
            if isinstance(metric, AnswerAccuracy):  # whose processes are added up
                counts[name] = counts.get(name, 0) + metric.counts
    lengths, depths = {9: 13, 16: 11, 32: 11}, {depth: 3 + (depth < 20) for depth in range(0, 101, 10)}
    expected = {"answers": 35} | {f"answers/length_{x}": count for x, count in lengths.items()}
    expected |= {f"answers/depth_{x}": count for x, count in depths.items()}
    assert {name: count.tolist() for name, count in counts.items()} == {name: [x, x] for name, x in expected.items()}
