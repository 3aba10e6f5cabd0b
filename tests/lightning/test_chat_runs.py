"""Fine-tuning on conversations with the command line: from old weights, to generated answers and exports."""

import json
from pathlib import Path

import pytest
import small_run
from small_texts import write_tokenizer
from transformers import AutoTokenizer

from dma_lightning.cli.generate import generate
from dma_lightning.cli.huggingface import export_hf
from dma_lightning.data.chat_templates import SIMPLE
from dma_lightning.saved_run import SavedRun

CHAT = ["-c=data/chat", "--data.path=chats.jsonl", "--data.chat_template=simple", "--data.sequence_length=64"]
CHAT += ["--data.batch_size=2", "--trainer.max_steps=3", "--trainer.logger.name=chat"]
LAST = Path("runs/chat/version_0/checkpoints/last.ckpt")
QUESTION = {"role": "user", "content": "0 0 0?"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with conversations that each fill a sequence."""
    monkeypatch.chdir(tmp_path)
    asked = ([{"role": "user", "content": f"{i} {i} {i}?"}, {"role": "assistant", "content": f"{i}"}] for i in range(8))
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in asked))


def test_answers_of_bytes_are_learned_from_old_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_run.make(tmp_path)
    cli = small_run.fit(*CHAT, f"--model.init_from={small_run.CHECKPOINTS}/last.ckpt")
    assert "tensors; optimizer, schedule and data start from scratch" in capsys.readouterr().out
    assert cli.model.model.config.keep_window_size == small_run.SIZES["keep_window_size"]
    assert {"val/loss", "val/bits_per_byte"} <= cli.trainer.callback_metrics.keys()
    whole = SavedRun.open(LAST).content["state_dict"]
    LAST.unlink()
    LAST.with_name("step=3.ckpt").unlink()
    resumed = small_run.fit(*CHAT, "--ckpt_path=last")
    assert "step=2.ckpt" in capsys.readouterr().out
    assert all((x == whole[name]).all() for name, x in resumed.model.state_dict().items() if name in whole)
    generate(LAST, ["<|user|>\n0 0 0?<|end|>\n<|assistant|>\n"], max_new_tokens=3, stop=["<|end|>"])
    assert capsys.readouterr().out.startswith("<|user|>\n0 0 0?<|end|>\n<|assistant|>\n")


def test_exports_have_the_template(tmp_path: Path) -> None:
    """Transformers writes a prompt as training did."""
    write_tokenizer(tmp_path / "tokenizer.json")
    small_run.fit(*CHAT, *small_run.MODEL, "--data.tokenizer=tokenizer.json")
    export_hf(LAST, Path("export"))
    assert Path("export/chat_template.jinja").read_text() == SIMPLE
    theirs = AutoTokenizer.from_pretrained("export")
    prompt = theirs.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>\n0 0 0?<|end|>\n<|assistant|>\n"


def test_other_checkpoints_have_none(tmp_path: Path) -> None:
    small_run.make(tmp_path)
    assert SavedRun.open(Path(small_run.CHECKPOINTS) / "last.ckpt").chat_template is None
