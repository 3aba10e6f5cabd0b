"""Configs that come with the package are found by name, in a clone and in a wheel."""

import tomllib
from pathlib import Path

import pytest

from dma_lightning.cli import shipped_configs
from dma_lightning.cli.shipped_configs import find_config, what_was_meant

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ("tiny", "model/tiny"),
        ("1.7b", "model/1.7b"),
        ("data/mqar", "data/mqar"),
        ("configs/trainer/cpu.yaml", "trainer/cpu"),
    ],
)
def test_names_of_shipped_configs(given: str, file: str) -> None:
    assert Path(find_config(given)) == ROOT / f"configs/{file}.yaml"


def test_a_file_wins() -> None:
    Path("data").mkdir()
    for name in ("tiny", "data/mqar"):
        Path(name).touch()
        assert find_config(name) == name
    Path("80m").mkdir()
    assert Path(find_config("80m")).name == "80m.yaml"  # a folder is no config


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("mqar", "did you mean 'data/mqar', 'model/mqar' or 'trainer/mqar'?"),
        ("needle", "did you mean 'data/needles' or 'data/text-needles'?"),
        ("trainer/cpuu", "did you mean 'trainer/cpu', "),
        ("tiny.yml", "did you mean 'tiny.yaml'?"),
        ("zzz", "the shipped configs are data/chat, data/induction, data/mqar, "),
    ],
)
def test_the_nearest_names_are_told(given: str, meant: str) -> None:
    assert find_config(given) == given
    assert meant in what_was_meant(given, ["tiny.yaml"])


def test_the_wheel_has_them_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    (places,) = build["force-include"].items()
    assert places == ("configs", "dma_lightning/configs")
    installed = tmp_path / places[1] / "model/tiny.yaml"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(shipped_configs, "_PACKAGE", tmp_path / "dma_lightning")
    assert shipped_configs.shipped_configs.__wrapped__() == {"model/tiny": installed}
