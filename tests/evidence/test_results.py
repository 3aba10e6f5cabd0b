"""The result file of a study, and the report made from it."""

import csv
import re
from pathlib import Path

import pytest
from study_records import DIGEST, ENVIRONMENT, record

from benchmarks.evidence.report import write_report
from benchmarks.evidence.results import RESULTS, Invocation, Results
from benchmarks.evidence.studies import Form, Grid, Size, Study, Task, read_study

STUDY = Study(
    forms={name: Form(options={"model.attention": name}) for name in ("mha", "dma")},
    tasks={"recall": Task("val/accuracy", "higher", evaluations={"needle": [], "positions": []})},
    sizes={"small": Size(budget=8)},
    grids=[Grid(["recall"], ["small"], ["mha", "dma"], [0.1, 0.2], [0], [1, 2])],
    baseline="mha",
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    calls = [Invocation(2, 3.5, ["a"], True, ENVIRONMENT)]
    results = Results([record("mha", 1, 0.5), record("dma", 0, 0.25)], calls, {"one": "no reason"})
    results.write(tmp_path / "new" / "study.json")
    assert Results.read(tmp_path / "new" / "study.json") == results
    assert [x.form for x in results.records] == ["dma", "mha"]
    first = results.records[0]
    assert results.of(first.cell, first.options, DIGEST) is first
    assert results.of(first.cell, first.options | {"model.lr": 0.2}, DIGEST) is None
    assert results.of(first.cell, first.options, "other") is None
    assert Results.read(tmp_path / "none.json") == Results()


def test_a_damaged_file_is_told_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text('{"records": [{"task": 1}]}')
    with pytest.raises(ValueError, match=r"study.json: expected results of a study: .*records\[0\]"):
        Results.read(path)
    assert path.read_text() == '{"records": [{"task": 1}]}'


def test_report_says_means_differences_and_rates(tmp_path: Path) -> None:
    costs = {"prompt_seconds_per_token": 2e-6, "step_seconds": 0.001, "cache_bytes": 2048}
    lengths = [{"length": 16, "loss": 1.5, "accuracy": 0.5, "answers": None, **costs}]
    needle = {"lengths": lengths, "cells": [{"length": 16, "depth": x, "answers": x / 100} for x in (0.0, 50.0, 100.0)]}
    positions = {"buckets": [{"first": 0, "last": 63, "loss": 2.5}, {"first": 64, "last": 99, "loss": 2.0}]}
    looked = {"evaluations": {"needle": needle, "positions": positions}}
    records = [record("mha", seed, value) for seed, value in enumerate((0.5, 0.7))]
    records += [record("dma", seed, value, **looked) for seed, value in enumerate((0.6, 0.9))]
    records += [record(form, 0, 0.1, lr=0.2) for form in ("mha", "dma")] + [record("of another study", 0, 1.0)]
    records += [
        record("dma", 0, 0.0, options={"model.lr": 0.1, "trainer.max_steps": 1}),
        record("mha", 0, 0.0, configs=""),
    ]
    names = [f"recall small dma, lr 0.1, seed {seed}" for seed in range(5)]
    calls = [Invocation(8, 1800.0, names, True, ENVIRONMENT, 2), Invocation(8, 60.0, names, False, ENVIRONMENT)]
    failures = {"recall small dma, lr 0.1, seed 2": "no memory"}
    Results(records, calls, failures).write(tmp_path / "study.json")
    text = write_report(STUDY, tmp_path / "study.json", tmp_path / "out").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert ["mha", "0.00M", "16", "6e+03", "0.1", "0.0", "2", "0.6000 ± 0.1414", ""] in rows
    (dma,) = (row for row in rows if row[0] == "dma" and row[4:5] == ["0.1"])
    assert dma[2] == "8"
    assert dma[7] == "0.7500 ± 0.2121"
    assert re.fullmatch(r"\+0\.1500 \[-0\.4853, \+0\.7853\]", dma[8])  # 0.15 ± 12.706 · 0.05
    assert ["dma", "0.6000, 0.9000", "0.1000"] in rows
    assert "- recall small mha, lr 0.1, seed 2\n- recall small dma, lr 0.1, seed 2: no memory\n" in text
    assert ["5 of recall small", "5", "2", "1,800", "10"] in rows
    assert sum(row[0].endswith("of recall small") for row in rows) == 1  # the other call tells no speed
    assert ["dma", "16", "1.5000", "50.0", "", "", "2.00", "1.00", "2"] in rows
    assert "another study" not in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / "out" / name).stat().st_size
    with (tmp_path / "out" / "recall-small-curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert [row["mean"] for row in curves if row["form"] == "mha"] == ["0.3", "0.6"]
    assert [row["tokens"] for row in curves if row["form"] == "mha"] == ["32", "64"]
    with (tmp_path / "out" / "recall-small-needle.csv").open() as file:
        assert [row["answers"] for row in csv.DictReader(file)] == ["0.0", "0.5", "1.0"]


def test_nothing_to_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"study.json: expected records of the study, got none; run it first"):
        write_report(STUDY, tmp_path / "study.json", tmp_path / "out")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_reports_are_those_of_the_results(tmp_path: Path, path: Path) -> None:
    _, study = read_study(path.stem)
    for file in write_report(study, path, tmp_path).parent.glob("*.*"):
        if file.suffix != ".png":
            assert (path.with_suffix("") / file.name).read_text() == file.read_text(), "run the report again"
