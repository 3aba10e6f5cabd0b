"""Studies: which cells they have, and the commands of the cells."""

import math
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks.evidence.studies import CONFIGS, STUDIES, Cell, Form, Study, flags, read_study
from dma_lightning.cli.entry import build_cli

RECALL = {"configs": ["data/mqar"], "metric": "val/accuracy", "better": "higher"}
STUDY = {
    "baseline": "mha",
    "configs": ["trainer/study"],
    "options": {"data.batch_size": 4},
    "forms": {"mha": {}, "dma": {"options": {"model.attention": "dma"}, "budget": {"model.keep_window_size": 1}}},
    "sizes": {"small": {"budget": 8}},
    "tasks": {"recall": RECALL},
    "grids": [
        {"tasks": ["recall"], "sizes": ["small"], "forms": ["mha", "dma"], "lr": [0.1, 0.2], "seeds": [0, 1],
         "best_seeds": [2, 3]}
    ],
}  # fmt: skip


def study(tmp_path: Path, **changed: object) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changed, sort_keys=False))
    name, found = read_study(str(path))
    assert name == "study"
    return found


def test_further_seeds_come_at_the_best_rate_when_all_rates_were_tried(tmp_path: Path) -> None:
    values: dict[Cell, float] = {}

    def value_of(cell: Cell, options: dict[str, object]) -> float | None:
        assert options["model.lr"] == cell.lr
        return values.get(cell)

    first = study(tmp_path).cells(value_of)
    assert len(first) == 2 * 2 * 2
    assert [cell.seed for cell in first] == [0] * 4 + [1] * 4  # a deadline leaves whole seeds
    for cell in first:
        values[cell] = {("mha", 0.1): 0.9, ("mha", 0.2): 0.8, ("dma", 0.1): 0.3}.get((cell.form, cell.lr), 0.5)
    del values[next(cell for cell in first if cell.form == "dma" and cell.seed == 1)]
    more = [cell for cell in study(tmp_path).cells(value_of) if cell not in first]
    assert more == [Cell("recall", "small", "mha", 0.1, seed) for seed in (2, 3)]


def test_a_rate_that_failed_is_not_the_best(tmp_path: Path) -> None:
    found = study(tmp_path)
    cells = found.cells(lambda cell, _: math.nan if cell.lr == 0.2 else 0.0)
    assert {cell.lr for cell in cells if cell.seed == 3} == {0.1}
    assert not [cell for cell in found.cells(lambda *_: math.nan) if cell.seed == 3]


def test_the_more_special_options_win(tmp_path: Path) -> None:
    grid = STUDY["grids"][0] | {"options": {"data.batch_size": 6}}
    cells = study(tmp_path, grids=[grid]).cells(lambda *_: None)
    options = cells[Cell("recall", "small", "dma", 0.2, 1)]
    expected = {"data.batch_size": 6, "model.attention": "dma", "model.keep_window_size": 8}
    assert options == expected | {"model.lr": 0.2, "seed_everything": 1}


def test_what_is_added_to_a_list_stays_beside_what_others_add(tmp_path: Path) -> None:
    forms = {"mha": {"options": {"trainer.callbacks+": ["two", {"class_path": "three"}]}}}
    grids = [STUDY["grids"][0] | {"forms": ["mha"]}]
    found = study(tmp_path, options={"trainer.callbacks+": ["one"]}, forms=forms, grids=grids)
    (cell, options), *_ = found.cells(lambda *_: None).items()
    added = [flag for flag in found.fit_arguments(cell, options, {}) if "callbacks+" in flag]
    assert added == [f"--trainer.callbacks+={value}" for value in ("one", "two", '{"class_path": "three"}')]


def test_budgets_are_shared_exactly() -> None:
    form = Form(budget={"window": 0.5, "blocks": 0.5}, units={"blocks": 4})
    assert form.keys(32) == {"window": 16, "blocks": 4}
    assert Form(budget={"a": 0.7, "b": 0.2, "c": 0.1}).keys(100) == {"a": 70, "b": 20, "c": 10}
    with pytest.raises(ValueError, match=r"budget: expected a number of keys that can be shared as .*, got 12"):
        form.keys(12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"baseline": "nobody"}, r"baseline: expected one of \['dma', 'mha'\], got 'nobody'"),
        ({"form": {}}, "unknown field `form`"),
        ({"gap": ["mha", "swa"]}, r"gap: expected forms of .*, got \['swa'\]"),
        ({"gap": ["mha", "mha"]}, "gap: expected two different forms, got 'mha' twice"),
        ({"gap": ["mha"]}, r"Expected `array` of length 2, got 1 - at `\$.gap`"),
        ({"tasks": {"recall": RECALL | {"also": {"val/loss": "less"}}}}, "Invalid enum value 'less'"),
        ({"tasks": {"recall": RECALL | {"also": {"val/accuracy": "higher"}}}}, "also: expected other figures than"),
        ({"forms": STUDY["forms"] | {"half": {"budget": {"x": 0.5}}}}, "forms.half.budget: expected shares that sum"),
        ({"grids": [STUDY["grids"][0] | {"forms": ["dam"]}]}, r"grids: expected forms of .*, got \['dam'\]"),
        ({"grids": [{"tasks": []}]}, r"missing required field `sizes`.*grids\[0\]"),
        ({"grids": [STUDY["grids"][0] | {"seeds": []}]}, "grids: expected at least one of seeds, got none"),
        ({"sizes": {"small": {"forms": {"dmaa": {}}}}}, r"sizes.small.forms: expected forms of .*, got \['dmaa'\]"),
        ({"base": "study.yaml"}, "expected a base that is another study"),
        ({"base": 3}, "base: Expected `str | null`, got `int`"),
        ({"options": None}, r"Expected `object`, got `null` - at `\$.options`"),
    ],
)
def test_a_wrong_study_is_told(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*" + message):
        study(tmp_path, **changed)


def test_one_cell_with_two_sets_of_options_is_told(tmp_path: Path) -> None:
    grid = STUDY["grids"][0]
    found = study(tmp_path, grids=[grid, grid | {"options": {"data.batch_size": 2}}])
    with pytest.raises(ValueError, match=r"expected one set of options for recall small mha, lr 0.1, seed 0, got two"):
        found.cells(lambda *_: None)


def test_no_study_is_told() -> None:
    with pytest.raises(ValueError, match=r"study: expected one of .*'first'.*, or a file, got 'frist'"):
        read_study("frist")


def test_variables_are_filled_in(tmp_path: Path) -> None:
    found = study(tmp_path, options={"data.path": "$text/train"})
    (cell, options), *_ = found.cells(lambda *_: None).items()
    assert "--data.path=/books/train" in found.fit_arguments(cell, options, {"text": "/books"})
    with pytest.raises(ValueError, match=r"expected a value of \$text, got none; give it by --set text="):
        found.fit_arguments(cell, options, {})


@cache  # studies share forms and sizes
def parameters_of(*given: str) -> int:
    return build_cli([*given], run=False).model.model.num_non_embedding_parameters


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_forms_of_a_task_have_equal_parameters_and_data(name: str) -> None:
    """Every form of each study is built as its command says: on drawn data, since text is not there."""
    _, found = read_study(name)
    for size in {size for grid in found.grids for size in grid.sizes}:
        sizes = {}
        for form in {form for grid in found.grids for form in grid.forms if size in grid.sizes}:
            given = [f"--config={CONFIGS / config}.yaml" for config in (*found.sizes[size].configs, "data/mqar")]
            model = {"model.attention": "mha"} | found.sizes[size].options | found.form_options(form, size)
            sizes[form] = parameters_of(*given, *flags(model, {}))
        assert max(sizes.values()) <= 1.03 * min(sizes.values()), (size, sizes)


def test_a_base_is_added_to(tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / "study.yaml"), "forms": {"swa": {}}}))
    _, found = read_study(str(tmp_path / "more.yaml"))
    assert list(found.forms) == ["mha", "dma", "swa"]
    assert found.grids == study(tmp_path).grids


def test_what_is_only_reported_is_part_of_no_training(tmp_path: Path) -> None:
    plain = study(tmp_path)
    more = {"also": {"val/loss": "lower"}, "solved": 0.95}
    found = study(tmp_path, tasks={"recall": RECALL | more}, gap=["mha", "dma"])
    assert list(found.tasks["recall"].metrics) == ["val/accuracy", "val/loss"]
    cells = plain.cells(lambda *_: None)
    assert found.cells(lambda *_: None) == cells
    assert [found.digest_of(cell) for cell in cells] == [plain.digest_of(cell) for cell in cells]


@pytest.mark.parametrize(("form", "shape"), [("rank-output", "tiny"), ("dma", "tiny-published")])
def test_tiny_trains_what_make_train_trains(form: str, shape: str) -> None:
    _, found = read_study("tiny")
    cells = {cell: options for cell, options in found.cells(lambda *_: None).items() if cell.seed == 0}
    cell = next(cell for cell in cells if cell.form == form)
    ours = build_cli(found.fit_arguments(cell, cells[cell], {})[1:], run=False)
    make = [f"--config={CONFIGS / name}.yaml" for name in (f"model/{shape}", "data/pydoc", "trainer/cpu")]
    theirs = build_cli(make, run=False)
    assert dict(ours.model.hparams) == dict(theirs.model.hparams)
    assert dict(ours.datamodule.hparams) == dict(theirs.datamodule.hparams)
    for name in (
        "max_steps",
        "val_check_interval",
        "check_val_every_n_epoch",
        "gradient_clip_val",
        "log_every_n_steps",
    ):
        assert getattr(ours.trainer, name) == getattr(theirs.trainer, name), name


@pytest.mark.parametrize("name", ["tiny", "memory-tasks"])
def test_small_studies_run_anywhere(name: str) -> None:
    _, found = read_study(name)
    for options in found.cells(lambda *_: None).values():
        assert options["trainer.precision"] == "32-true"
        assert not options["model.compile_layers"]
        assert "trainer.accelerator" not in options
        assert "$" not in str(options)  # needs no text
