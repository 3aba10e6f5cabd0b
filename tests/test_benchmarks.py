"""Benchmarks say what they measure, do not import each other, and have their results in the docs."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels that benchmarks measure are Triton's")

import readme_figures

from harness import Part, Picture, Result, Table, markdown
from harness.command_line import CommandLine
from harness.results import RESULTS, load, record, write
from harness.tables import interval, length_of

ROOT = Path(__file__).parents[1]
FILES = {file.stem: file for file in (ROOT / "benchmarks").glob("*.py")}
MEASURING = sorted(name for name, file in FILES.items() if "CommandLine(" in file.read_text())
SHOWN = sorted(name for name, file in FILES.items() if re.search(r"^def tables\(", file.read_text(), re.MULTILINE))


def test_they_are_found() -> None:
    assert {"cpu_attention", "fuzz", "gpu_kernels", "train_seeds"} <= set(MEASURING)
    assert {"cpu_attention", "fuzz", "gpu_fit", "size_tables"} <= set(SHOWN)


@pytest.mark.parametrize("name", FILES)
def test_none_imports_another(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & FILES.keys()
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in FILES


@pytest.mark.parametrize("name", MEASURING)
def test_help_says_what_is_measured_on_what_and_for_how_long(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = import_module(name)
    with pytest.raises(SystemExit, match="0"):
        module.main()
    told = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in told
    needs, takes = re.search(r"^Needs: (.*)\.\nTakes: (.*)\.$", told, re.MULTILINE).groups()
    assert ("GPU" in needs) is name.startswith("gpu")
    assert re.search(r"\b(second|minute|hour)s?\b", takes)
    assert "--out" in told


@pytest.mark.parametrize("page", readme_figures.pages(), ids=lambda page: page.stem)
def test_figures_are_those_of_the_result_files(page: Path) -> None:
    assert readme_figures.updated(page) == page.read_text()


def test_what_every_benchmark_says_is_in_a_page() -> None:
    text = "".join(page.read_text() for page in readme_figures.pages())
    marked = {name for _, name, _ in readme_figures.SECTION.findall(text)}
    assert marked == set(SHOWN)


@pytest.mark.parametrize("name", [name for name in SHOWN if name in MEASURING])
def test_every_cell_has_a_head(name: str) -> None:
    for part in readme_figures.parts_of(name):
        if isinstance(part, Table):
            rows = part.markdown().split("\n\n")[-1].splitlines()
            assert {row.count(" |") for row in rows} == {len(part.columns)}
            assert len(rows) > 2


def test_pictures_are_found_from_the_folder_of_a_page() -> None:
    picture = Picture("Time", "speed.png")
    for folder, path in ((ROOT, "benchmarks/figures/speed.png"), (ROOT / "docs", "../benchmarks/figures/speed.png")):
        assert markdown([picture], folder) == f"![Time]({path})"
        assert (folder / path).exists()


@pytest.mark.parametrize(
    "text",
    [
        "<!-- figures: benchmarks/size_tables.py -->\n\nx",
        "<!-- figures: size_tables -->\n\nx\n\n<!-- end of figures -->",
        "<!-- figures: benchmarks/size_tables.py -->\nx\n<!-- end of figures -->",
        "x\n\n<!-- end of figures -->",
    ],
)
def test_a_marker_in_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: expected .*NAME\.py"):
        readme_figures.updated(tmp_path / "page.md")


def test_figures_are_written_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- figures: benchmarks/fuzz.py -->\n\nold\n\n<!-- end of figures -->\n\nb\n")
    tables = markdown(readme_figures.parts_of("fuzz"))
    written = readme_figures.updated(page)
    assert written == page.read_text().replace("old", tables)
    page.write_text(written)
    assert readme_figures.updated(page) == written


def test_an_interruption_loses_one_row(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"ms": 1}
        raise KeyboardInterrupt

    out = tmp_path / "folder" / "result.json"
    with pytest.raises(KeyboardInterrupt):
        record(out, {"environment": {}}, {"rows": rows()})
    assert out.read_text() == '{\n "environment": {},\n "rows": [\n  {\n   "ms": 1\n  }\n ]\n}\n'
    assert [file.name for file in out.parent.iterdir()] == ["result.json"]


def test_a_benchmark_prints_its_tables_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tables(result: Result) -> list[Part]:
        return [
            Table(
                result["rows"],
                "Milliseconds:",
                ["N", "ms", ""],
                lambda row: [length_of(row), interval(row["ms"]), None],
            )
        ]

    record(
        tmp_path / "x.json", {}, {"rows": [{"length": 512, "ms": [1, 2, 3]}, {"length": 2048, "ms": [4, 5, 6]}]}, tables
    )
    rows = "| N | ms | |\n| --- | ---: | ---: |\n| 0.5k | 2 [1 - 3] | |\n| 2k | 5 [4 - 6] | |\n"
    assert capsys.readouterr().out.endswith(f"x.json\nMilliseconds:\n\n{rows}")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_result_files_are_as_the_harness_writes_them(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "result.json", load(path.stem))
    assert (tmp_path / "result.json").read_text() == path.read_text()


def test_a_benchmark_without_its_gpus_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit, match="2"):
        CommandLine("Doc.", "name", gpus=2, duration="a minute").parse_args([])
    assert "expected several CUDA GPUs of one machine, got 1; run it on such a machine" in capsys.readouterr().err


def test_results_are_named_after_what_is_measured() -> None:
    line = CommandLine("Doc.", "gpu_fit_{shape}", duration="a minute")
    line.add_argument("shape")
    assert line.parse_args(["80m"]).out == RESULTS / "gpu_fit_80m.json"
    assert line.parse_args(["80m", "--out", "x.json"]).out == Path("x.json")


@pytest.mark.parametrize("length", ["0", "-4", "4k"])
def test_a_length_is_a_number_of_tokens(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = CommandLine("Doc.", "name", duration="a minute")
    line.add_lengths([4096])
    assert line.parse_args([]).lengths == [4096]
    assert line.parse_args(["--lengths", "1", "63"]).lengths == [1, 63]
    with pytest.raises(SystemExit, match="2"):
        line.parse_args([f"--lengths={length}"])
    assert f"expected a number of tokens, at least 1, got '{length}'" in capsys.readouterr().err


def test_drawn_cases_are_counted_by_area() -> None:
    counts_of, of_all = import_module("fuzz").counts_of, {"selection": 100, "drift": 100, "flex": 2}
    assert counts_of(["all"], of_all) == of_all
    assert counts_of(["all", "drift=500"], of_all) == of_all | {"drift": 500}
    assert list(counts_of(["flex", "selection=7"], of_all).items()) == [("selection", 7), ("flex", 2)]
    for wrong in ("masks", "drift=", "drift=few", "all=3"):
        with pytest.raises(ValueError, match=f"expected areas of selection, drift, flex, .*, got {wrong}"):
            counts_of([wrong], of_all)
