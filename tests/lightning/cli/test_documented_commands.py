"""The commands in README and docs run as written, only for fewer steps, on a CPU and with small models."""

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from dma_lightning.cli import main
from dma_lightning.cli.init import STARTING_CONFIG
from dma_lightning.cli.shipped_configs import find_config

ROOT = Path(__file__).parents[3]
SMALL = shlex.split(
    "--model.hidden_size 32 --model.intermediate_size 32 --model.num_hidden_layers 1 --model.head_dim 16 "
    "--data.sequence_length 64 --data.batch_size 2 --data.num_workers 0"
)
SHORT = shlex.split(
    "--trainer.max_steps 2 --trainer.limit_val_batches 1 --trainer.num_sanity_val_steps 0 --trainer.accelerator cpu "
    "--trainer.precision 32-true --model.compile_layers false --model.cuda_graphs false"
)
SHOWS = {"--help", "--print_config"}
PAGES = ("README.md", "docs/install.md", "docs/command-line.md", "docs/generation.md", "docs/data.md")


def commands(page: str) -> list[list[str]]:
    """Arguments of every `dma-lightning` line in the shell examples of a page."""
    text = (ROOT / page).read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in blocks.splitlines())
    return [line[1:] for line in lines if line and line[0].endswith("dma-lightning")]


def shortened(command: list[str]) -> list[str]:
    """The command with fewer steps, on a CPU. Models are small, unless a checkpoint determines their size."""
    if command[0] == "generate":
        return [*command, "--max_new_tokens", "3"]
    if command[0] == "validate":
        return [*command, "--trainer.limit_val_batches", "1"]
    if command[0] != "fit" or SHOWS & set(command):
        return command
    options = ["--trainer.devices", "2" if "ddp" in command else "1"]
    if "ddp" in command:  # whose batches are others than those of the run that `last` goes on with
        options += ["--trainer.logger.init_args.name", "ddp"]
    from_checkpoint = any(argument.endswith(".ckpt") for argument in command)
    if "last" in command or from_checkpoint:
        options += ["--trainer.max_steps", "3"]
    return [*command, *SHORT, *options, *([] if from_checkpoint else SMALL)]


@pytest.fixture
def _new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the project's configs, some text in several formats, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("configs").symlink_to(ROOT / "configs")
    text = "\n".join(f"w{i % 50} w{i % 7}" for i in range(10_000))
    for folder in ("books", "corpus"):
        Path(folder).mkdir()
        Path(folder, "a.txt").write_text(text)
    Path("stories.txt").write_text(f"{text}<|endoftext|>{text}")
    Path("web").mkdir()
    parquet.write_table(pa.table({"content": [text, text]}), "web/train-0.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [text, text]})}).save_to_disk("wiki")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")


@pytest.mark.usefixtures("_new_user")
def test_commands_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 15
    found.sort(key=lambda command: any(argument.endswith(".ckpt") for argument in command))  # once there are some
    for command in found:
        arguments = shortened(command)
        if "ddp" in command:
            program = [sys.executable, "-m", "dma_lightning", *arguments]
            done = subprocess.run(program, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert "MEMBER: 2/2" in done.stderr, done.stderr
            continue
        monkeypatch.setattr("sys.argv", ["dma-lightning", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit, match="0") if SHOWS & set(command) else nullcontext():
            main()
        if "--ckpt_path" in command and command[0] == "fit":
            output = capsys.readouterr().out
            assert "step=2.ckpt" in output or "last" not in command, "begins anew"
            assert "nothing to do" not in output


def read(config: str) -> dict[str, Any]:
    """A config in an example: a shipped one, by path or name, or the one that `init` writes."""
    file = Path(find_config(config))
    return yaml.safe_load((STARTING_CONFIG if file.name == "config.yaml" else ROOT / file).read_text())


@pytest.mark.parametrize("page", ["docs/command-line.md", "docs/training.md"])
def test_documented_training_exercises_the_selection(page: str) -> None:
    """Sequences are longer than the window."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if " fit -c " in line and "`" not in line]
    lines = [line for line in lines if "--ckpt_path" not in line or "last" in line]  # a file says what it was made with
    assert len(lines) > 2
    for line in lines:
        options = dict(pairwise(line))
        files = [read(file) for flag, file in pairwise(line) if flag == "-c"]
        configured = next(file["data"]["init_args"]["sequence_length"] for file in files if "data" in file)
        window = next(file["model"]["keep_window_size"] for file in files if "model" in file)
        assert window < int(options.get("--data.sequence_length", configured)), line


@pytest.mark.usefixtures("_new_user")
@pytest.mark.parametrize("program", ["dma-lightning", "torchrun"])
def test_sharded_training_runs(program: str) -> None:
    """The commands of docs/training.md with FSDP2, on two processes of one machine."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/training.md").read_text(), flags=re.DOTALL)
    lines = [shlex.split(line) for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    (command,) = (line for line in lines if line[:1] == [program] and "configs/trainer/fsdp.yaml" in line)
    options = command[command.index("fit") :]
    modules = ["-m", "dma_lightning"]
    if program == "torchrun":
        assert command[: command.index("fit")][-2:] == modules
        modules = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *modules]
    one_machine = ["--trainer.devices", "2", "--trainer.num_nodes", "1"]
    done = subprocess.run(
        [sys.executable, *modules, *options, *SHORT, *SMALL, *one_machine], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert list(Path("runs").rglob("step=2.ckpt"))
