"""Tables of a report: which columns there are, and what they contain."""

from collections.abc import Sequence

import msgspec
import pytest
from study_records import MODEL, record

from benchmarks.evidence.masks import mask_figures
from benchmarks.evidence.results import Record
from benchmarks.evidence.studies import Form, Grid, Size, Study, Task
from benchmarks.evidence.tables import forms_table, masks_table, metric_tables

LOSS = "val/loss"
TASK = Task("val/accuracy", "higher", also={LOSS: "lower"}, solved=0.5)
STUDY = Study(
    forms={name: Form() for name in ("swa", "mha", "dma")},
    tasks={"recall": TASK},
    sizes={"small": Size(budget=8)},
    grids=[Grid(["recall"], ["small"], ["swa", "mha", "dma"], [0.1], [0, 1, 2])],
    baseline="swa",
    gap=("swa", "mha"),
)


def trained(form: str, *values: float, **more: object) -> list[Record]:
    return [record(form, seed, value, **more) for seed, value in enumerate(values)]


BEST = {
    "swa": trained("swa", 0.1, 0.2, 0.15),
    "mha": trained("mha", 0.9, 0.95, 1.0),
    "dma": trained("dma", 0.4, 0.5, 0.6),
}


def cells(table: str) -> dict[str, dict[str, str]]:
    """The cells of a table, by form and column head."""
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def forms(best: dict[str, list[Record]], study: Study = STUDY) -> tuple[str, dict[str, dict[str, str]]]:
    text, table = forms_table(study, best, study.tasks["recall"])
    return text, cells(table)


def test_several_p_values_are_corrected() -> None:
    text, found = forms(BEST)
    assert "Holm" in text
    # Of t = 0.8 / 0.0289 = 27.7 and 0.35 / 0.05 = 7 with two degrees of freedom: twice 0.0013, once 0.0198.
    assert [found[form]["p (Holm)"] for form in ("swa", "mha", "dma")] == ["", "0.0026", "0.02"]
    text, found = forms({"swa": BEST["swa"], "dma": BEST["dma"]})
    assert "Holm" not in text
    assert "p (Holm)" not in found["dma"]
    _, found = forms({"dma": BEST["dma"]})
    assert "difference" not in found["dma"]


def test_keys_of_a_query_are_the_mean_over_layers() -> None:
    wide = MODEL | {"attention": "dma", "wide_layers": [1], "wide_keep_window_size": 12}
    _, found = forms({"swa": BEST["swa"], "dma": trained("dma", 0.4, model=wide)}, STUDY)
    assert found["dma"]["keys per query"] == "10"  # of 6 + 2, 12 + 2 and 6 + 2
    _, found = forms(BEST)
    assert [found[form]["keys per query"] for form in BEST] == ["16", "16", "8"]


def test_share_of_the_gap_stands_where_it_can_be_said() -> None:
    text, found = forms(BEST)
    assert "from `swa` to `mha`" in text
    assert found["dma"]["gap closed"].startswith("44 % [")  # 0.35 of 0.8
    assert found["swa"]["gap closed"] == found["mha"]["gap closed"] == ""
    early = {"mha": [record("mha", 0, 0.9, steps=1, curves={"val/accuracy": [(1, 0.9)]}), *BEST["mha"][1:]]}
    for best, study in (
        (BEST, msgspec.structs.replace(STUDY, gap=None)),
        (BEST | early, STUDY),
        ({form: BEST[form] for form in ("swa", "dma")}, STUDY),
        ({form: BEST[form] for form in ("swa", "mha")}, STUDY),
    ):
        text, found = forms(best, study)
        assert "gap closed" not in found["swa"]
        assert "gap" not in text


def test_seeds_that_have_solved_a_task_are_counted() -> None:
    diverged = record("dma", 3, 0.0, curves={"val/accuracy": [(1, 0.9), (2, None)]})
    _, found = forms(BEST | {"dma": [*BEST["dma"], diverged]})
    assert [found[form]["val/accuracy ≥ 0.5"] for form in ("swa", "mha", "dma")] == ["0 of 3", "3 of 3", "2 of 4"]
    lower = msgspec.structs.replace(TASK, better="lower")
    _, found = forms(BEST, msgspec.structs.replace(STUDY, tasks={"recall": lower}))
    assert [found[form]["val/accuracy ≤ 0.5"] for form in ("swa", "mha", "dma")] == ["3 of 3", "0 of 3", "2 of 3"]
    never = msgspec.structs.replace(TASK, solved=None)
    _, found = forms(BEST, msgspec.structs.replace(STUDY, tasks={"recall": never}))
    assert not [head for head in found["dma"] if "0.5" in head]


def test_further_figures_have_tables_of_those_that_have_logged_them() -> None:
    def losses(form: str, *values: float) -> list[Record]:
        curves = [{"val/accuracy": [(2, 0.5)], LOSS: [(1, 9.0), (2, value)]} for value in values]
        return [record(form, seed, 0.5, curves=curve) for seed, curve in enumerate(curves)]

    best = BEST | {"swa": losses("swa", 2.0, 2.5), "dma": [*losses("dma", 1.0, 2.0), record("dma", 2, 0.5)]}
    text, table = metric_tables(STUDY, best, "recall")
    assert text == "`val/loss` at the end of the same trainings, lower is better:"
    found = cells(table)
    assert found.keys() == {"swa", "dma"}
    assert found["dma"] | {"difference": ""} == {
        "form": "dma", "n": "2", "val/loss": "1.5000 ± 0.7071", "difference": ""
    }  # fmt: skip
    assert found["dma"]["difference"].startswith("-0.7500 [")
    with pytest.raises(ValueError, match=r"tasks.recall.also: expected figures of \['val/accuracy'\], got 'val/loss'"):
        list(metric_tables(STUDY, BEST, "recall"))


def masks(*layers: tuple[float | None, float, float]) -> dict[str, object]:
    """Curves of lost masses: the mask's own, a window's, and the best keys'."""
    names = ("lost_mass", "lost_mass_window", "lost_mass_best")
    own = {
        f"dma/layer_{i}/{name}": [(1, 0.9), (2, value)]
        for i, layer in enumerate(layers)
        for name, value in zip(names, layer, strict=True)
    }
    return {
        "curves": {"val/accuracy": [(2, 0.5)], "dma/layer_0/efficiency": [(2, -50.0)], "dma/keeps_all": [(2, 1.0)]}
        | own
    }


def test_masks_are_means_over_layers_and_seeds() -> None:
    nothing_to_gain = (0.06, 0.0101, 0.01)  # a layer's efficiency of -499
    seeds = [record("dma", 0, 0.5, **masks(nothing_to_gain, (0.2, 0.4, 0.1)))]
    seeds += [record("dma", 1, 0.5, **masks(nothing_to_gain, (0.3, 0.5, 0.1)))]
    figures = mask_figures(seeds)
    assert figures["lost_mass"] == pytest.approx((0.06 + 0.2 + 0.06 + 0.3) / 4)
    window, best = (0.0101 * 2 + 0.4 + 0.5) / 4, (0.01 * 2 + 0.1 + 0.1) / 4
    assert figures["efficiency"] == pytest.approx((window - figures["lost_mass"]) / (window - best))
    same = mask_figures([record("dma", 0, 0.5, **masks((0.2, 0.1, 0.1)))])
    assert "efficiency" not in same
    diverged = mask_figures([record("dma", 0, 0.5, **masks((None, 0.1, 0.1), (0.5, 0.1, 0.1)))])
    assert diverged["lost_mass"] == 0.5


def test_forms_without_figures_of_masks_are_left_out() -> None:
    def table(best: dict[str, Sequence[Record]]) -> list[str]:
        return list(masks_table(best))

    looked = [*trained("dma", 0.5, **masks((0.2, 0.4, 0.1))), record("dma", 1, 0.5)]
    _, text = table(BEST | {"dma": looked})
    assert cells(text) == {
        "dma": {
            "form": "dma", "n": "1", "lost mass": "0.2000", "that of a window": "0.4000",
            "that of the best keys": "0.1000", "efficiency": "0.6667", "own key seen": "",
        }
    }  # fmt: skip
    other = record("dma", 0, 0.5, curves={"val/accuracy": [(2, 0.5)], "dma/layer_0/births": [(2, 1.0)]})
    assert table({"swa": BEST["swa"], "dma": [other]}) == []
