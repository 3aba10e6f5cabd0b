"""Tasks of lm-evaluation-harness: each request gives what the harness's own class gives for the exported model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest
import small_run
import torch
from chosen_form import CHOSEN
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from small_texts import write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dma_lightning.transformers  # noqa: F401  # so that Transformers knows our model
from dma_lightning.cli import main
from dma_lightning.evaluation import Reader, TrainedRun, harness
from dma_lightning.trained_models import saved_tokenizer

ROOT = Path(__file__).parents[3]
TASKS = Path(__file__).parent / "tasks"
NAMES = ["capitals", "capitals_text", "capitals_written"]
LENGTH = 48  # of a training sequence, below that of some contexts and texts
KINDS = {
    "chosen form": [f"--model.{name}={value}" for name, value in CHOSEN.items()],
    "doge": ["--model.keep_window_size=64"],  # above all lengths, since it breaks ties at random
    "mla": ["--model.attention=mla"],
    "swa": ["--model.attention=swa", "--model.sliding_window=9"],
}


def spread(content: dict[str, Any]) -> None:
    """Give a checkpoint random weights, so that every weight has an effect."""
    torch.manual_seed(7)
    for x in content["state_dict"].values():
        if x.ndim > 1:
            x.copy_(torch.randn(x.shape) * 2 * x.shape[-1] ** -0.5)


def write_metaspace(path: Path, vocab_size: int) -> None:
    """Write a tokenizer like those of SentencePiece, whose texts begin with an invisible space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    tokenizer.save(str(path))


def make_run(folder: Path, *args: str) -> Path:
    """Make a run with a checkpoint in the working folder, and write the documents of the tasks there."""
    shutil.copy(TASKS / "capitals.jsonl", folder)
    small_run.make(folder, f"--data.sequence_length={LENGTH}", "--model.eos_token_id=10", *args)
    return small_run.changed(spread, f"{small_run.CHECKPOINTS}/spread.ckpt").resolve()


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def command(*args: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dma-lightning", *map(str, args)])
        main()


def ours(checkpoint: Path, **options: Any) -> Any:
    run = TrainedRun.open(checkpoint, "cpu")
    tokenizer = saved_tokenizer(run.saved, run.module, "parse")
    reader = Reader(run.module.model, chunk_size=options.pop("chunk_size", 2048))
    return harness.HarnessLM.of_model(reader, tokenizer, run.module.model.config, **options)


def requests() -> dict[str, list[Instance]]:
    """The requests of all tasks by kind, with two examples in each context."""
    found: dict[str, list[Instance]] = {}
    for task in harness.TaskManager(include_path=TASKS, include_defaults=False).load(NAMES)["tasks"].values():
        task.set_config("num_fewshot", 2 if task.OUTPUT_TYPE == "multiple_choice" else 0)
        task.set_fewshot_seed(1234)
        task.build_all_requests()
        for request in task.instances:
            found.setdefault(request.request_type, []).append(request)
    return found


@pytest.mark.parametrize(("kind", "tokenizer"), [*product(KINDS, ["bytes", "bpe"]), ("chosen form", "metaspace")])
def test_each_request_gets_what_the_exported_model_gives(kind: str, tokenizer: str, tmp_path: Path) -> None:
    options = list(KINDS[kind])
    if tokenizer != "bytes":
        (write_tokenizer if tokenizer == "bpe" else write_metaspace)(tmp_path / "t.json", 320)
        options += ["--data.tokenizer=t.json", "--data.special_tokens=parse"]
    checkpoint = make_run(tmp_path, *options)
    command("export-hf", checkpoint, "exported")
    is_doge = json.loads(Path("exported/config.json").read_text())["model_type"] == "doge"
    assert is_doge == (kind == "doge")
    own = ours(checkpoint, batch_size=5, chunk_size=13)
    theirs = HFLM("exported", device="cpu", dtype="float32", batch_size=3)
    assert (own.max_length, own.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id) == (LENGTH, 10)
    asked = requests()
    without_context = [Instance("loglikelihood", {}, ("", text), number) for number, text in enumerate(["Paris", "a"])]
    pairs = asked["loglikelihood"] + without_context
    for found, expected in zip(own.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert found == pytest.approx(expected, rel=0, abs=1e-4)
    texts = asked["loglikelihood_rolling"]
    found, expected = own.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts)
    assert found == pytest.approx(expected, rel=0, abs=1e-4)
    assert any(len(own.tok_encode(request.args[0])) > LENGTH for request in texts)  # several windows
    written = own.generate_until(asked["generate_until"])
    assert written == theirs.generate_until(asked["generate_until"])
    assert len(set(written)) > 2
    assert own.truncated > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a byte-level model."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("sys.argv", ["dma-lightning"])
        return make_run(folder)


def test_the_command_of_the_page_runs_offline(checkpoint: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    (example,) = (line for line in page.splitlines() if line.startswith("    dma-lightning evaluate"))
    task, document = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("yaml", "json"))
    Path("tasks").mkdir()
    Path("tasks/capitals.yaml").write_text(task[0])
    Path("capitals.jsonl").write_text(document[0] * 5)
    arguments = [str(checkpoint) if "/last.ckpt" in word else word for word in shlex.split(example)[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "dma_lightning", *arguments, "--device=cpu", "--limit=3", "--num_fewshot=1"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "| capitals | none | 1 | 3 | acc | " in done.stdout
    assert f"9 contexts lost their beginning: max_length is {LENGTH}" in done.stderr
    found = json.loads(Path("capitals.json").read_text())
    (row,) = found["results"]
    facts = {"task": "capitals", "documents": 3, "num_fewshot": 1, "metric": "acc", "higher_is_better": True}
    assert row | facts == row
    assert found | {"limit": 3, "batch_size": 16, "max_length": LENGTH, "prefix_token_id": 10, "step": 3} == found
    assert [field for field in {*found, *row} if f"`{field}`" not in page] == []


@pytest.fixture
def _own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the harness's thousands of tasks, which take seconds to find."""
    shutil.copy(TASKS / "capitals.jsonl", ".")
    only = partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", only)


@pytest.mark.usefixtures("_own_tasks_only")
def test_scores_of_several_tasks(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At any batch size; accuracy follows from the likelihoods."""
    for batch_size in (1, 6):
        output = f"{batch_size}.json"
        command(
            "evaluate", f"--ckpt_path={checkpoint}", "--tasks=geography, capitals_text", "--tasks=capitals_w*",
            f"--include_path={TASKS}", f"--batch_size={batch_size}", "--device=cpu", f"--output={output}",
        )  # fmt: skip
    one, six = (json.loads(Path(f"{size}.json").read_text())["results"] for size in (1, 6))
    assert [(row["task"], row["metric"]) for row in one] == [
        ("capitals", "acc"), ("capitals", "acc_norm"), ("capitals_text", "word_perplexity"),
        ("capitals_text", "bits_per_byte"), ("capitals_written", "exact_match"), ("geography", "acc"),
    ]  # fmt: skip
    assert [row["value"] for row in one] == pytest.approx([row["value"] for row in six], rel=1e-4)
    assert f"| capitals_text | none | 0 | 7 | bits_per_byte | {one[3]['value']:.4f} | – |" in capsys.readouterr().out
    task = harness.TaskManager(include_path=TASKS).load(["capitals"])["tasks"]["capitals"]
    task.build_all_requests()
    nats = torch.tensor([nats for nats, _ in ours(checkpoint).loglikelihood(task.instances)]).view(7, 4)
    right = nats.argmax(1) == torch.tensor([0, 1, 2, 3, 0, 1, 2])
    assert one[0]["value"] == one[5]["value"] == pytest.approx(right.double().mean().item())


@pytest.mark.usefixtures("_own_tasks_only")
@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_scores_are_those_of_the_harness_itself(num_fewshot: int | None, checkpoint: Path) -> None:
    names, manager = ["geography", "capitals_few"], harness.TaskManager(include_path=TASKS)
    own = harness.scores_of_tasks(ours(checkpoint), manager, names, num_fewshot, limit=5)
    expected = simple_evaluate(ours(checkpoint), tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=5)
    assert own == {name: expected[name] for name in own}
    assert [own["n-shot"][task] for task in ("capitals", "capitals_few")] == [num_fewshot or 0, num_fewshot or 1]


@pytest.mark.usefixtures("_own_tasks_only")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks=capitls"], "tasks: expected names of tasks, got 'capitls'; did you mean 'capitals'?"),
        (["--tasks=x*"], r"got 'x\*'; `lm-eval ls tasks` lists them, and --include_path adds your own"),
        (["--tasks=capitals", "--limit=0"], "limit: expected at least 1, got 0"),
        (["--tasks=capitals", "--batch_size=0"], "batch_size: expected at least 1, got 0"),
        (["--tasks=capitals", "--max_length=1"], "max_length: expected at least 2, got 1"),
        (["--tasks=capitals", "--num_fewshot=-1"], "num_fewshot: expected at least 0, got -1"),
        (["--tasks=capitals", "--include_path=nowhere"], "include_path: expected a folder with YAML files"),
        (["--tasks=capitals", "--output=capitals.jsonl"], "output: expected no such file"),
        (["--tasks=capitals", "--ckpt_path=nowhere.ckpt"], "ckpt_path: expected a checkpoint file"),
        (["--tasks=capitals_text", "--prefix_token_id=256"], "prefix_token_id: expected tokens below the model's"),
        (["--tasks=capitals", "--max_length=3"], "expected continuations of 1 to max_length = 3 tokens, got"),
        (["--tasks=capitals_written", "--max_length=12"], r"expected 1 to 11 new tokens \(max_gen_toks\), below"),
    ],
)
def test_what_cannot_be_is_told(args: list[str], message: str, checkpoint: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        command("evaluate", f"--ckpt_path={checkpoint}", f"--include_path={TASKS}", "--device=cpu", *args)


def test_what_a_task_asks_for_in_generation(checkpoint: Path) -> None:
    lm = ours(checkpoint)

    def asked(**options: Any) -> Any:
        return lm._continuing(Instance("generate_until", {}, ("a", options), 0, metadata=("drawn", 0, 1)))

    assert (asked(max_gen_toks=5).max_new_tokens, asked(max_gen_toks=5).sampling.temperature) == (5, 0)
    sampling = asked(max_gen_toks=5, do_sample=True, temperature=0.7, top_p=0.9).sampling
    assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
    assert asked(max_gen_toks=5, do_sample=True).sampling.temperature == 1
    assert asked(max_gen_toks=5, do_sample=False, temperature=0.7, top_p=0.9).sampling.top_p is None
    assert asked(max_gen_toks=5, until="x").stop == ("x",)
    with pytest.raises(ValueError, match=r"task drawn: expected generation_kwargs among .*, got \['num_beams'\]"):
        asked(num_beams=3)


def test_texts_without_context_need_a_token_before_them(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["eos_token_id"] = None
    torch.save(content, tmp_path / "endless.ckpt")
    request = Instance("loglikelihood_rolling", {}, ("Wien",), 0)
    with pytest.raises(ValueError, match="prefix_token_id: expected a token to read before texts without context"):
        ours(tmp_path / "endless.ckpt").loglikelihood_rolling([request])
    given = ours(tmp_path / "endless.ckpt", prefix_token_id=10).loglikelihood_rolling([request])
    assert given == ours(checkpoint).loglikelihood_rolling([request])
    empty = Instance("loglikelihood", {}, ("Wien", ""), 0, metadata=("drawn", 0, 1))
    with pytest.raises(ValueError, match="task drawn: expected continuations of at least one token, got ''"):
        ours(checkpoint).loglikelihood([empty])
