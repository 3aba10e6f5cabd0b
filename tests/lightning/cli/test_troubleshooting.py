"""The messages in docs/troubleshooting.md are what the commands print."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from dma_lightning.cli.entry import main

ROOT = Path(__file__).parents[3]
LAYERS = "fit -c configs/model/tiny.yaml -c configs/data/text.yaml -c configs/trainer/cpu.yaml"
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SHOWN = re.findall(r"```bash\ndma-lightning (.*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)


def test_there_are_ten() -> None:
    assert len(SHOWN) == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is printed without a GPU")
@pytest.mark.parametrize(("command", "message"), SHOWN, ids=[command for command, _ in SHOWN])
def test_mistakes_print_what_the_page_shows(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    Path("configs").symlink_to(ROOT / "configs")
    Path("books").mkdir()
    for name in "ab":
        Path("books", f"{name}.txt").write_text("alpha beta gamma delta\n" * 1000)
    Path("mine.yaml").write_text("model: {hiden_size: 128}\n")
    monkeypatch.setattr(sys, "argv", ["dma-lightning", *shlex.split(command.replace("...", LAYERS, 1))])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert printed == " ".join(message.split("\n"))
    assert not Path("runs").exists()
