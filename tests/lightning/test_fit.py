"""Whole runs of the command line: curves, checkpoints, reproducing the final figure, and two processes."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dma_lightning import LanguageModel, generation
from dma_lightning.callbacks import ContinuationWriter, continuations
from dma_lightning.cli import build_cli, main
from dma_lightning.cli.prepare import prepare
from dma_lightning.monitoring import samples
from dma_lightning.strategies import FullyShardedStrategy

ROOT = Path(__file__).parents[2]
TINY = ["-c", "configs/model/tiny.yaml", "-c", "configs/data/pydoc.yaml", "-c", "configs/trainer/cpu.yaml"]
SMALL = ["--model.num_hidden_layers=1", "--model.hidden_size=32", "--model.intermediate_size=32"]
STEPS = 6


def small_run(folder: Path, subcommand: str, *args: str) -> list[str]:
    """Arguments of a subcommand for a tiny model, with logs and caches below a folder."""
    paths = [f"--trainer.logger.init_args.save_dir={folder}", f"--data.cache_dir={folder / 'cache'}"]
    return [subcommand, *TINY, *SMALL, *paths, *args]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version folder of a finished `fit` whose last step is not a multiple of the validation interval."""
    folder = tmp_path_factory.mktemp("runs")
    intervals = ["--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build_cli(small_run(folder, "fit", f"--trainer.max_steps={STEPS}", *intervals))
    return folder / "cpu" / "version_0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "cuda_graphs: expected compile_layers and no activation_checkpointing, got False and False"),
        (["--model.compile_layers=true"], "cuda_graphs: expected a GPU, .* got cpu, SingleDeviceStrategy and 1"),
    ],
)
def test_cuda_graphs_where_there_are_none(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        build_cli(small_run(tmp_path, "fit", "--model.cuda_graphs=true", *options))


def test_processes_that_share_weights_do_not_predict() -> None:
    model = LanguageModel(vocab_size=16)
    model._trainer = SimpleNamespace(
        datamodule=None, strategy=FullyShardedStrategy(), world_size=2, accumulate_grad_batches=1
    )
    model.setup("validate")
    with pytest.raises(ValueError, match=r"predict: expected one process, or DDP, .* got 2 with FullyShardedStrategy"):
        model.setup("predict")


def test_the_loss_of_a_step_is_that_of_all_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    losses, real = [], LanguageModel.training_step

    def record(*args: object) -> torch.Tensor:
        loss = real(*args)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(LanguageModel, "training_step", record)
    options = ["--trainer.accumulate_grad_batches=3", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    build_cli(small_run(tmp_path, "fit", *options, "--trainer.limit_val_batches=0"))
    curves = scalars(tmp_path / "cpu/version_0")
    assert curves["train/loss"] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)
    assert curves["train/perplexity"] == pytest.approx([math.exp(loss) for loss in curves["train/loss"]], rel=1e-5)


def scalars(folder: Path) -> dict[str, list[float]]:
    """All curves of an event file."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_curve(run: Path) -> None:
    curves = scalars(run)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert len(curves[f"train/{name}"]) == STEPS
        assert len(curves[f"val/{name}"]) == 2
    for name in ("lr-AdamW/pg1", "lr-AdamW/pg2", "grad_norm"):
        assert len(curves[name]) == STEPS
    assert all(math.isfinite(value) for curve in curves.values() for value in curve)
    assert curves["val/bits_per_byte"][-1] == pytest.approx(curves["val/loss"][-1] / math.log(2), rel=1e-5)
    assert curves["val/perplexity"][-1] == pytest.approx(math.exp(curves["val/loss"][-1]), rel=1e-4)
    assert curves["val/loss"][1] < curves["val/loss"][0]
    assert curves["lr-AdamW/pg1"][0] == pytest.approx(0.004)


def last_validation(run: Path) -> dict[str, float]:
    """Figures of the last validation in the event file."""
    return {name: values[-1] for name, values in scalars(run).items() if name.startswith("val/")}


def test_validate_prints_the_figure_of_the_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    cli = build_cli(small_run(run.parents[1], "validate", f"--ckpt_path={run / 'checkpoints/last.ckpt'}"))
    found = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
    assert found == pytest.approx(last_validation(run), rel=1e-6)
    assert "val/bits_per_byte" in capsys.readouterr().out


def validate(run: Path, *args: str) -> dict[str, float]:
    """Figures of `validate` on the run's checkpoint, without any config."""
    arguments = ["validate", f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--trainer.logger=false", *args]
    for _ in range(2):  # it leaves nothing in the folder
        cli = build_cli(arguments)
    return {name: value.item() for name, value in cli.trainer.callback_metrics.items()}


def test_checkpoint_alone_is_enough_to_validate(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    assert validate(run) == pytest.approx(last_validation(run), rel=1e-6)
    assert not any("callbacks used to create the checkpoint" in str(warning.message) for warning in recwarn)


def test_command_line_wins_over_the_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    figures = validate(run, "--model.keep_window_size=1")
    assert figures["val/loss"] != pytest.approx(last_validation(run)["val/loss"], rel=1e-6)
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    flags = ["--model.lr=0.5", "--data=dma_lightning.MQARDataModule", "--data.sequence_length=64", "--data.num_pairs=4"]
    cli = build_cli(["validate", checkpoint, "--trainer.fast_dev_run=1", *flags])
    assert cli.model.hparams.lr == 0.5
    assert cli.datamodule.task.num_pairs == 4
    assert cli.model.model.config.hidden_size == 32


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--model.hidden_size=64", "hidden_size 64 instead of 32"),
        ("--model.attention=mha", "attention 'mha' instead of 'dma'"),
    ],
)
def test_weights_of_another_model_are_refused(
    arg: str, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"expected a model with the weights of .*, got one with {message};"):
        validate(run, arg)


@pytest.mark.parametrize("subcommand", ["test", "predict"])
def test_other_subcommands_run(run: Path, subcommand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    cli = build_cli(small_run(run.parents[1], subcommand, checkpoint, f"--trainer.limit_{subcommand}_batches=2"))
    if subcommand == "test":
        assert math.isfinite(cli.trainer.callback_metrics["test/bits_per_byte"])


def predict(run: Path, *args: str) -> list[dict]:
    """The lines that `predict` writes."""
    callbacks = ("--trainer.callbacks=dma_lightning.callbacks.ContinuationWriter", *args) if args else ()
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    trainer = ["--trainer.limit_predict_batches=2", "--trainer.accelerator=cpu"]
    cli = build_cli(["predict", checkpoint, "--data.path=a.txt", "--data.cache_dir=cache", *trainer, *callbacks])
    (writer,) = (x for x in cli.trainer.callbacks if isinstance(x, ContinuationWriter))
    return [json.loads(line) for line in writer.file.read_text().splitlines()]


def test_predict_writes_continuations(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{i} squared is {i * i}.\n" for i in range(4000))
    for folder in (tmp_path, tmp_path / "again"):
        folder.mkdir(exist_ok=True)
        (folder / "a.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    lines = predict(run)
    assert [line["index"] for line in lines] == list(range(16))
    for line in lines:
        assert line["prompt"] + line["expected"] in text
        assert len(line["prompt"].encode()) == 128
    model = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True).model
    tokens = model.generate(torch.tensor([list(lines[9]["prompt"].encode())]), 128)[0].tolist()
    assert lines[9]["continuation"] == bytes(tokens).decode(errors="replace")

    options = ["path=some/out.jsonl", "prompt_length=10", "max_new_tokens=5", "sampling.temperature=1.0"]
    chosen = [f"--trainer.callbacks.{option}" for option in options]
    monkeypatch.chdir(tmp_path / "again")
    lines = predict(run, *chosen)
    assert {(len(line["prompt"]), len(line["expected"])) for line in lines} == {(10, 5)}
    (tmp_path / "again/config.yaml").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"out\.jsonl: expected no such file"):
        predict(run, *chosen)
    with pytest.raises(ValueError, match="prompt_length: expected at most the 256 tokens"):
        predict(run, "--trainer.callbacks.prompt_length=300", "--trainer.callbacks.path=other.jsonl")


def test_documents_are_gone_on_with_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {i}, of {i} things " * (2 + i % 4) for i in range(60)]
    Path(tmp_path, "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    prepare("a.jsonl", Path("prepared"), processes=1)
    calls = []

    def spy(model: object, input_ids: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        calls.append((input_ids, options.get("padding"), torch.is_autocast_enabled("cpu")))
        return generation.generate(model, input_ids, *args, **options)

    for module in (continuations, samples):
        monkeypatch.setattr(module, "generate", spy)
    options = [*SMALL, "--data=PreparedDataModule", "--data.path=prepared", "--data.sequence_length=128"]
    options += ["--data.val_fraction=0.3", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    options += ["--trainer.precision=bf16-mixed", "--trainer.logger=false"]
    monitor = ["--trainer.callbacks=dma_lightning.monitoring.SampleMonitor", "--trainer.max_steps=1"]
    monitor += ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs"]
    build_cli(["fit", *options, *monitor, "--trainer.val_check_interval=1", "--trainer.num_sanity_val_steps=0"])
    writer = ["--trainer.callbacks=dma_lightning.callbacks.ContinuationWriter", "--trainer.callbacks.path=out.jsonl"]
    with pytest.warns(UserWarning, match="predict: no --ckpt_path given, so the weights are random"):
        cli = build_cli(["predict", *options, *writer])
    (prompt, _, _), *of_writer = calls
    assert any(bytes(prompt[0].tolist()).decode() in text for text in texts)
    assert all(autocast for *_, autocast in calls)
    assert any(padding is not None for _, padding, _ in of_writer)
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert all(any(line["prompt"] + line["expected"] in text for text in texts) for line in lines)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = cli.model.model.generate(torch.tensor([list(lines[0]["prompt"].encode())]), 64)[0].tolist()
    assert lines[0]["continuation"] == bytes(tokens).decode(errors="replace")


def test_checkpoint_loads_in_python(run: Path) -> None:
    model = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)
    assert model.model.config.hidden_size == 32
    assert model(torch.randint(0, 256, (1, 9))).shape == (1, 9, 256)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    assert (run / "checkpoints/last.ckpt").is_symlink()


def test_only_matrices_decay(run: Path) -> None:
    groups = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    model = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)
    contents = len(model.model.layers)  # matrices, too, but they do not decay
    matrices = sum(p.ndim >= 2 for p in model.parameters()) - contents
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [
        (matrices, 0.01),
        (len(list(model.parameters())) - matrices, 0.0),
    ]


def test_report_tells_start_end_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    build_cli(small_run(tmp_path, "fit", "--trainer.max_steps=2"))
    report = capsys.readouterr().out
    line = next(line for line in report.splitlines() if line.startswith("val/bits_per_byte:"))
    start, end = (float(word) for word in line.replace(",", "").split() if word[0].isdigit())
    assert end < start
    assert end == pytest.approx(last_validation(tmp_path / "cpu/version_0")["val/bits_per_byte"], abs=1e-4)
    assert str(tmp_path / "cpu/version_0/checkpoints/last.ckpt") in report
    assert f"tensorboard --logdir {tmp_path / 'cpu/version_0'}" in report


def test_report_names_tensorboard_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    build_cli(["fit", *TINY, *SMALL, *logger, f"--data.cache_dir={tmp_path}", "--trainer.max_steps=1"])
    assert "TensorBoard" not in capsys.readouterr().out


def test_resumed_run_continues(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    cli = build_cli(small_run(tmp_path, "fit", checkpoint, f"--trainer.max_steps={STEPS + 2}"))
    assert cli.trainer.global_step == STEPS + 2


def test_two_processes_agree(tmp_path: Path) -> None:
    args = small_run(tmp_path, "fit", "--trainer.max_steps=3", "--trainer.strategy=ddp", "--trainer.devices=2")
    args += ["--trainer.log_every_n_steps=1"]
    args += ["--trainer.callbacks+=write_metrics.WriteMetrics", f"--trainer.callbacks.init_args.folder={tmp_path}"]
    args += ["--model.drift=gate", "--model.score_form=linear"]
    args += [f"--trainer.callbacks+=dma_lightning.monitoring.{name}" for name in ("LostMassMonitor", "DriftMonitor")]
    args += ["--trainer.callbacks+=dma_lightning.monitoring.FarCopyMonitor", "--trainer.callbacks.window=1"]
    args += ["--trainer.callbacks.order=1"]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "dma_lightning", *args, "--trainer.enable_model_summary=false"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["speed/tokens_seen"] for rank in ranks] == [2 * 3 * 8 * 256] * 2  # in both, steps, sequences, length
    assert all(math.isfinite(value) for value in ranks[0].values())
    reduced = [name for name in ranks[0] if name.startswith(("train/", "val/", "dma/", "drift/"))]
    assert {"train/loss", "val/loss", "val/perplexity", "val/bits_per_byte"} <= set(reduced)
    assert {"val/far_copy_loss", "val/far_copy_share", "dma/layer_0/lost_mass"} <= set(reduced)
    assert {"drift/layer_0/per_window", "drift/layer_0/efold_50", "drift/layer_0/spread"} <= set(reduced)
    assert all(ranks[0][name] == ranks[1][name] for name in reduced)
    assert ranks[0]["train/perplexity"] == pytest.approx(math.exp(ranks[0]["train/loss"]))
    checkpoints = [file for file in tmp_path.rglob("*.ckpt") if not file.is_symlink()]
    assert len(checkpoints) == 1


def generate(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """Run `dma-lightning generate`."""
    monkeypatch.setattr("sys.argv", ["dma-lightning", "generate", *args])
    main()


def test_generate_streams_text_and_says_how_fast(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    texts = []
    for options in (["--seed=1"], ["--seed=1"], ["--seed=2"], ["--seed=1", "--full_cache=true"]):
        generate(monkeypatch, checkpoint, "--prompt=The ", "--max_new_tokens=40", *options)
        printed = capsys.readouterr()
        assert printed.out.startswith("The ")
        assert re.fullmatch(r"40 tokens in [\d.]+ s, \d+ tokens/s\n", printed.err.splitlines(keepends=True)[-1])
        texts.append(printed.out)
    assert texts[0] == texts[1] == texts[3] != texts[2]
    greedy = ["--temperature=0", "--backend=reference", "--device=cpu", "--max_new_tokens=9"]
    generate(monkeypatch, checkpoint, "--prompt=The ", *greedy)
    model = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True).model
    tokens = model.generate(torch.tensor([list(b"The ")]), 9)[0].tolist()
    assert capsys.readouterr().out == "The " + bytes(tokens).decode(errors="replace") + "\n"


@pytest.mark.parametrize(
    ("given", "strings"),
    [
        *((f"--stop={text}", [text]) for text in (".", "###", "# Title", "\n#", "null", "~", "[INST]", "1", "\n\n")),
        ("--seed=1", []),
    ],
)
def test_generate_takes_stop_strings_as_they_are(
    given: str, strings: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    take = lambda tokenizer, tokens, stop, prompt_tokens: iter(found.append(stop) or ())  # noqa: E731
    monkeypatch.setattr("dma_lightning.cli.generate.decode_until", take)
    generate(monkeypatch, f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--prompt=a", given)
    assert found == [strings]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "ckpt_path: expected a checkpoint file"),
        ("truncated", "got one that cannot be read"),
        ("text", "got one that cannot be read"),
        ("empty", "got one that cannot be read"),
        ("not text", "expected a model of text: one of bytes, or one with a tokenizer.json"),
    ],
)
def test_generate_tells_what_is_wrong_with_a_checkpoint(
    damage: str, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = (run / "checkpoints/last.ckpt").read_bytes(), tmp_path / "some.ckpt"
    content = {"truncated": whole[: len(whole) // 2], "text": b"no checkpoint", "empty": b""}
    if damage in content:
        path.write_bytes(content[damage])
    elif damage == "not text":
        saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        saved["hyper_parameters"]["bytes_per_token"] = None
        torch.save(saved, path)
    with pytest.raises(SystemExit, match=f"dma-lightning generate: .*{message}"):
        generate(monkeypatch, f"--ckpt_path={path}", "--prompt=a")


def test_generate_refuses_a_typo(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    for options in (["--prompt=a", "--temprature=1"], ["--prompt=a", "--top_k=x"]):
        with pytest.raises(SystemExit):
            generate(monkeypatch, checkpoint, *options)
        error = capsys.readouterr().err
        assert re.search(r"temprature|top_k", error)
    with pytest.raises(SystemExit, match="prompt"):
        generate(monkeypatch, checkpoint, "--prompt=")
    with pytest.raises(SystemExit, match="top_p"):
        generate(monkeypatch, checkpoint, "--prompt=a", "--top_p=2")


def test_a_prompt_may_be_a_file_or_standard_input(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--max_new_tokens=3", "--device=cpu"]
    text = "# The\r\nend é\n"
    (tmp_path / "-").write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    printed = []
    for given in (f"--prompt={text}", f"--prompt_file={tmp_path / '-'}", "--prompt_file=-"):
        generate(monkeypatch, *options, given)
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith(text)
    assert printed[0] == printed[1] == printed[2]


def test_several_samples_and_prompts_come_in_order(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--max_new_tokens=20", "--device=cpu", "--seed=5"]

    def texts(*given: str) -> list[str]:
        generate(monkeypatch, *options, *given)
        printed = capsys.readouterr()
        found = re.split(r"(?m)^--- prompt (\d+) of \d+, sample (\d+) of \d+ ---\n", printed.out)
        samples = len(found) // 3 or 1
        assert printed.err.splitlines()[-1].startswith(f"{20 * samples} tokens in ")
        if len(found) > 1:
            pairs = list(zip(found[1::3], found[2::3], strict=True))
            assert pairs == sorted(pairs)
        return found[3::3] or found

    one, three = texts("--prompt=The "), texts("--prompt=The ", "--num_samples=3")
    assert three[:1] == one  # which is what it was without samples
    assert len(set(three)) == 3
    assert texts("--prompt=The ", "--num_samples=2") == three[:2]  # seeds do not depend on how many there are
    both = texts("--prompt=The ", "--prompt=An ", "--num_samples=3")
    assert both[:3] == three
    assert both[3:] == texts("--prompt=An ", "--num_samples=3")


def test_a_stop_string_ends_each_sample(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--device=cpu", "--prompt=The ", "--num_samples=4"]
    generate(monkeypatch, *options, "--max_new_tokens=60")
    whole = re.split(r"(?m)^--- .* ---\n", capsys.readouterr().out)[1:]
    stops = [whole[0][20:23], whole[2][9:11]]
    generate(monkeypatch, *options, "--max_new_tokens=60", *(f"--stop={stop}" for stop in stops))
    ended = re.split(r"(?m)^--- .* ---\n", capsys.readouterr().out)[1:]
    ends = [min(x.find(stop, 4) % (len(x) + 1) for stop in stops) for x in (text[:-1] for text in whole)]
    assert [text[:-1] for text in ended] == [text[:-1][:end] for text, end in zip(whole, ends, strict=True)]
    assert ended[0] != whole[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --prompt or --prompt_file, got none of them"),
        (["--prompt=a", "--prompt_file=b"], "expected --prompt or --prompt_file, got both"),
        (["--prompt_file=no such file"], "prompt_file: expected a file of UTF-8 text, .* No such file"),
        (["--prompt_file=latin"], "prompt_file: expected a file of UTF-8 text, .* can't decode byte 0xe9"),
        (["--prompt_file=empty"], "prompt_file empty: expected text, got none"),
        (["--prompt=a", "--prompt="], "prompt: expected text, got none"),
        (["--prompt=a", "--num_samples=0"], "num_samples: expected at least 1, got 0"),
        (
            ["--prompt=a", "--stop=", "--stop=a"],
            r"stop: expected a list of strings, none of them empty, got \['', 'a'\]",
        ),
    ],
)
def test_generate_tells_what_is_wrong_with_prompts_and_stops(
    options: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes(b"caf\xe9")
    Path("empty").touch()
    with pytest.raises(SystemExit, match=f"^dma-lightning generate: {message}"):
        generate(monkeypatch, f"--ckpt_path={run / 'checkpoints/last.ckpt'}", *options)
