"""`init` writes a config that combines the shipped ones and explains each option."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dma_lightning.cli.default_callbacks import DEFAULT_CALLBACKS
from dma_lightning.cli.entry import main
from dma_lightning.cli.shipped_configs import find_config


def init(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dma-lightning", "init", folder])
    main()


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(tmp_path)
    init("some/project", monkeypatch)
    assert "dma-lightning fit -c some/project/config.yaml" in capsys.readouterr().out
    return Path("some/project/config.yaml").read_text()


def test_nothing_is_overwritten(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("some/project/config.yaml")
    path.write_text(written + "# mine\n")
    with pytest.raises(SystemExit, match=r"dma-lightning init: folder: expected no config\.yaml in it, since nothing"):
        init("some/project", monkeypatch)
    assert path.read_text().endswith("# mine\n")
    with pytest.raises(SystemExit, match="folder: expected a folder or none, got the file"):
        init(str(path), monkeypatch)


def test_every_option_has_a_comment(written: str) -> None:
    holds_options = re.compile(r" *\w+:$")
    lines = [x for x in written.splitlines() if x and not x.startswith("#") and not holds_options.match(x)]
    assert len(lines) > 50
    assert [x for x in lines if "  # " not in x] == []


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {name: merged(old[name], new[name]) for name in old.keys() & new if isinstance(new[name], dict)}
    return old | new | both


def test_it_is_the_shipped_configs_together(written: str) -> None:
    """And so runs as `make train` does; the command itself is among those of docs/install.md."""
    content, shipped = yaml.safe_load(written), {}
    for name in ("tiny", "pydoc", "trainer/cpu"):
        shipped = merged(shipped, yaml.safe_load(Path(find_config(name)).read_text()))
    shipped["trainer"]["logger"]["init_args"]["name"] = "first"
    assert merged(content, shipped) == content
    assert content.keys() == {"seed_everything", "model", "data", "trainer", *DEFAULT_CALLBACKS}
