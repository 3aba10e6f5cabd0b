"""Every command opens its checkpoint once. The only other reading is Lightning's own restore."""

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CHECKPOINTS, DATA, MODEL, fit, validate

from dma_lightning.checkpoints.io import read_checkpoint
from dma_lightning.cli import main
from dma_lightning.files import zip_checksums
from dma_lightning.trained_models import load_checkpoint, tokenizer_of

NEWEST = f"{CHECKPOINTS}/step=3.ckpt"


@pytest.fixture
def readings(_small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """In a copy of the small run: how often each checkpoint is opened and compared with its checksums, by its name."""
    subprocess.run(["cp", "-a", f"{_small_run}/.", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    found: Counter = Counter()
    load, check = torch.load, zip_checksums._check_zip

    def counting_load(file: Any, *args: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike) and Path(file).suffix == ".ckpt":
            found["opened", Path(file).resolve().name] += 1
        return load(file, *args, **options)

    def counting_check(file: Any, size: int, path: Path) -> None:
        found["checksums", path.resolve().name] += 1
        check(file, size, path)

    monkeypatch.setattr(torch, "load", counting_load)
    monkeypatch.setattr(zip_checksums, "_check_zip", counting_check)
    zip_checksums._verified.clear()
    yield found
    zip_checksums._verified.clear()


def once(name: str = Path(NEWEST).name, restored: bool = False) -> Counter:
    """What a command should read. With `restored`, Lightning also loads the checkpoint into the run."""
    return Counter({("opened", name): 1 + restored, ("checksums", name): 1})


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["dma-lightning", *args])
    main()


def test_what_counts_sees_each_reading(readings: Counter) -> None:
    for name in ("last.ckpt", "step=3.ckpt", "step=3.ckpt"):
        read_checkpoint(Path(CHECKPOINTS, name))
    assert readings == Counter({("opened", "step=3.ckpt"): 3, ("checksums", "step=3.ckpt"): 1})


@pytest.mark.parametrize("name", ["last.ckpt", "step=3.ckpt"])
def test_validate(name: str, readings: Counter) -> None:
    validate(f"{CHECKPOINTS}/{name}")
    assert readings == once(restored=True)


def test_fit_from_a_checkpoint(readings: Counter) -> None:
    fit(f"--ckpt_path={CHECKPOINTS}/step=2.ckpt", "--trainer.max_steps=4")
    assert readings == once("step=2.ckpt", restored=True)


def test_fit_from_a_checkpoint_that_a_config_names(readings: Counter) -> None:
    Path("more.yaml").write_text(f"ckpt_path: {NEWEST}\n")
    fit("--config=more.yaml", "--trainer.max_steps=4", *MODEL, *DATA)
    assert readings == once(restored=True)


def test_fit_from_the_last(readings: Counter) -> None:
    cli = fit("--ckpt_path=last", "--trainer.max_steps=4", *MODEL, *DATA)
    assert cli.trainer.global_step == 4
    assert readings == once(restored=True)


def test_fit_from_the_last_whole_one(readings: Counter) -> None:
    content = bytearray(Path(NEWEST).read_bytes())
    content[len(content) // 2] ^= 1
    Path(NEWEST).write_bytes(content)
    with pytest.warns(UserWarning, match=r"last skips .*step=3\.ckpt"):
        fit("--ckpt_path=last", "--trainer.max_steps=4", *MODEL, *DATA)
    assert readings == once("step=2.ckpt", restored=True) + Counter({("checksums", "step=3.ckpt"): 1})


def test_generate(readings: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "generate", f"--ckpt_path={NEWEST}", "--prompt=a", "--max_new_tokens=2", "--device=cpu")
    assert readings == once()


def test_export_hf(readings: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "export-hf", NEWEST, "exported")
    assert readings == once()


def test_python(readings: Counter) -> None:
    module = load_checkpoint(Path(NEWEST), "cpu")
    assert readings == once()
    assert tokenizer_of(module, Path(NEWEST)).vocab_size == 256


def test_a_run_lets_go_of_the_checkpoint_that_it_has_opened(readings: Counter) -> None:
    """Else the space of a file that training deletes would stay taken."""
    cli = fit(f"--ckpt_path={NEWEST}", "--trainer.max_steps=4")
    assert cli.saved is None
    if (maps := Path("/proc/self/maps")).exists():
        assert Path(NEWEST).name not in maps.read_text()
