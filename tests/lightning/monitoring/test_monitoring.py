"""What a run logs: every documented tag, exact figures, and no waiting for the device between logging steps."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils._python_dispatch import TorchDispatchMode

from dma_lightning.backends import explain_backend
from dma_lightning.cli.entry import DMACLI, build_cli
from dma_lightning.config import ModelConfig
from dma_lightning.mixers import MIXERS
from dma_lightning.model import DogeForCausalLM
from dma_lightning.monitoring import SpeedMonitor, peaks, speed
from dma_lightning.monitoring.progress import _steps_between
from dma_lightning.monitoring.summary import duration

ROOT = Path(__file__).parents[3]
LAYERS = [f"--config={ROOT}/configs/{name}.yaml" for name in ("model/tiny-published", "data/pydoc", "trainer/cpu")]
SMALL = ["--model.num_hidden_layers=2", "--model.hidden_size=32", "--model.intermediate_size=32"]
SHORT = ["--data.sequence_length=64", "--model.keep_window_size=16", "--data.batch_size=2"]
LIMITS = ["--trainer.limit_val_batches=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
SHARED = ("Every attention", "Every attention, after validations", "Every attention, at the end")
DYNAMIC = ("Dynamic mask attention, layer by layer", "Dynamic mask attention, after validations")
STEPS, TOKENS = 3, 2 * 64  # optimizer steps of a run, and tokens of a batch


def fit(folder: Path, *args: str) -> DMACLI:
    """Run `fit` for three steps with the shipped configuration of callbacks, logging below a folder."""
    paths = [f"--trainer.logger.init_args.save_dir={folder}", f"--data.cache_dir={folder.parent / 'cache'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return build_cli(["fit", *LAYERS, *SMALL, *SHORT, *LIMITS, f"--trainer.max_steps={STEPS}", *paths, *args])


def events(folder: Path) -> EventAccumulator:
    """Everything in the event files of a run."""
    read = EventAccumulator(str(folder / "cpu" / "version_0"), size_guidance=dict.fromkeys(("scalars", "tensors"), 0))
    read.Reload()
    return read


def tags(read: EventAccumulator) -> set[str]:
    """All tags in the event files, as TensorBoard shows them. Tags that differ only in their number count as one."""
    found = {tag for kind in ("scalars", "images", "histograms", "tensors") for tag in read.Tags()[kind]}
    found |= set(read.PluginTagToContent("hparams"))
    for name, number in (("layer", 0), ("length", 256), ("depth", 50)):
        found = {re.sub(rf"\b{name}_\d+", f"{name}_{number}", tag) for tag in found}
    return {tag.removesuffix("/text_summary") for tag in found}


def documented(*sections: str) -> set[str]:
    """Tags in the tables of the given sections of docs/tensorboard.md."""
    page = (ROOT / "docs" / "tensorboard.md").read_text()
    parts = {part.split("\n", 1)[0]: part for part in page.split("\n## ")}
    rows = [re.findall(r"^\| (`.*?) \|", parts[section], re.MULTILINE) for section in sections]
    return {tag for cells in rows for cell in cells for tag in re.findall(r"`(.+?)`", cell)}


def values(read: EventAccumulator, tag: str) -> list[float]:
    """A curve."""
    return [event.value for event in read.Scalars(tag)]


@pytest.fixture(scope="module")
def dma(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What a run with dynamic mask attention wrote."""
    folder = tmp_path_factory.mktemp("dma")
    fit(folder)
    return events(folder)


def test_every_documented_tag_is_there_and_no_other(dma: EventAccumulator) -> None:
    assert tags(dma) == documented(*SHARED, *DYNAMIC)


@pytest.mark.parametrize("attention", ["mha", "nsa"])
def test_other_attentions_show_what_all_share(attention: str, tmp_path: Path) -> None:
    fit(tmp_path, f"--model.attention={attention}")
    assert tags(events(tmp_path)) == documented(*SHARED)


@pytest.mark.parametrize(
    ("config", "sections"),
    [
        ("induction", ["Drawn tasks"]),
        ("needles", ["Drawn tasks", "Needles"]),
        ("text-needles", ["Drawn tasks", "Needles"]),
    ],
)
def test_drawn_tasks_report_whole_answers(config: str, sections: list[str], tmp_path: Path) -> None:
    layers = [f"--config={ROOT}/configs/{name}.yaml" for name in ("model/tiny", f"data/{config}", "trainer/mqar")]
    paths = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.logger.init_args.name=cpu"]
    paths += ["--data.val_examples=4", f"--trainer.max_steps={STEPS}"]
    if config == "text-needles":
        paths += [f"--data.cache_dir={tmp_path / 'cache'}", "--data.sequence_length=160"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        build_cli(["fit", *layers, *SMALL, *SHORT, *LIMITS, *paths])
    found = tags(events(tmp_path))
    assert documented(*sections) <= found
    assert any("answers/" in tag for tag in found) == ("Needles" in sections)


def test_figures_stand_at_the_same_steps(dma: EventAccumulator) -> None:
    steps = [event.step for event in dma.Scalars("train/loss")]
    assert steps == [0, 1, 2]
    for tag in documented("Every attention"):
        if tag.startswith(("speed/", "memory/")):
            assert [event.step for event in dma.Scalars(tag)] == steps, tag


def test_tokens_and_progress_bar_count_on_after_a_checkpoint(
    dma: EventAccumulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert values(dma, "speed/tokens_seen") == [TOKENS, 2 * TOKENS, 3 * TOKENS]
    (checkpoint,) = (file.resolve() for file in Path(dma.path).rglob("last.ckpt"))
    more = ["--trainer.max_steps=5", "--trainer.accumulate_grad_batches=2"]
    bar = fit(tmp_path, f"--ckpt_path={checkpoint}", *more).trainer.progress_bar_callback
    assert values(events(tmp_path), "speed/tokens_seen") == [4 * TOKENS, 6 * TOKENS]
    shown = bar.train_progress_bar
    assert (shown.desc, shown.initial, shown.n) == ("Epoch 0: ", 3, 6)
    assert shown.total == 7  # two steps of two batches, of which one was made before, when steps had one


def test_speed_is_exact_and_leaves_validation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(pl.LightningModule, "on_before_backward", lambda *_: setattr(clock, "now", clock.now + 0.5))
    monkeypatch.setattr(
        pl.LightningModule, "on_validation_batch_end", lambda *_: setattr(clock, "now", clock.now + 100)
    )
    limits = ["--trainer.val_check_interval=1", "--trainer.accumulate_grad_batches=2"]
    cli = fit(tmp_path, *limits, "--sample_monitor=null", "--speed_monitor.peak_flops=1e9")
    read = events(tmp_path)
    flops = cli.model.model.training_flops(64)
    assert values(read, "speed/tokens_per_s") == pytest.approx([TOKENS / 0.5] * STEPS)
    assert values(read, "speed/tflops_per_s") == pytest.approx([flops * TOKENS / 0.5 / 1e12] * STEPS)
    assert values(read, "speed/mfu") == pytest.approx([flops * TOKENS / 0.5 / 1e9] * STEPS)
    assert clock.now > 300


def test_training_flops_know_how_sparse_a_mixer_is() -> None:
    with torch.device("meta"):
        models = {name: DogeForCausalLM(ModelConfig(attention=name)) for name in ("dma", "mha")}
    layers, width = 4, 128
    weights = sum(p.numel() for p in models["mha"].parameters())
    assert models["mha"].training_flops(256) == 6 * weights + 3 * layers * 4 * width * (256 + 1) / 2
    sparse = models["dma"].training_flops(256) - 6 * sum(p.numel() for p in models["dma"].parameters())
    seen = (sum(range(1, 65)) + 192 * 64) / 256  # keys of a query, the mean, with w = 64
    assert sparse == pytest.approx(3 * layers * 4 * width * seen)


def test_peaks_are_dense_and_known_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA B200": 2250e12,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peaks.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == pytest.approx(peak)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    torch.set_float32_matmul_precision("high")
    try:
        assert peaks.peak_flops(torch.device("cuda"), torch.float32)[0] == 494e12
    finally:
        torch.set_float32_matmul_precision("highest")
    assert peaks.peak_flops(torch.device("cuda"), torch.float32)[0] == 67e12
    measured, source = peaks.peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < measured < 1e15
    assert "measured" in source


@pytest.mark.parametrize("peak", [0, -1.0])
def test_impossible_peak(peak: float) -> None:
    with pytest.raises(ValueError, match=r"peak_flops: expected FLOP/s above 0, such as 989e12, got"):
        SpeedMonitor(peak)


class Syncs(TorchDispatchMode):
    """Records at which step a tensor is converted to a number, which would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: pl.Trainer | None = None
        self.steps: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and self.trainer is not None:
            self.steps.append(self.trainer.global_step)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_logging_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sgd(groups: list[dict], lr: float, fused: bool | None) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr, fused=fused)  # AdamW reads its step counters, but only on a CPU

    synced, reduce = [], SingleDeviceStrategy.reduce

    def noted(strategy: SingleDeviceStrategy, *args: object, **options: object) -> object:
        synced.append(strategy.lightning_module.trainer.global_step)
        return reduce(strategy, *args, **options)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # for the progress bar
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", noted)
    monkeypatch.setattr("dma_lightning.optimizers.AdamW", sgd)
    monkeypatch.setattr(
        pl.LightningModule, "on_train_epoch_start", lambda self: setattr(syncs, "trainer", self.trainer)
    )
    options = ["--trainer.log_every_n_steps=10", "--trainer.limit_val_batches=0"]
    with Syncs() as syncs:
        cli = fit(tmp_path, *options, "--trainer.max_steps=25")
    assert {step for step in syncs.steps if 0 < step < 11} == {10}  # before the first step, the sampler draws a seed
    # From then on there are the figures in the progress bar, which are on the CPU whatever the device.
    shown = cli.trainer.progress_bar_metrics
    assert set(shown) == {"loss", "mfu", "tokens/s"}
    assert all(syncs.steps.count(step) % len(shown) == 0 for step in range(12, 20))
    assert set(synced) == {0}  # at the beginning Lightning compares loaders; one process has no others to ask
    assert [event.step for event in events(tmp_path).Scalars("speed/mfu")] == [9, 19, 24]
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [9, 19, 24]


def test_summary_tells_the_run_and_how_long_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = fit(tmp_path, "--trainer.accumulate_grad_batches=3")
    words = " ".join(capsys.readouterr().out.split())
    model = cli.model.model
    assert f"parameters {model.num_parameters:,}, {model.num_non_embedding_parameters:,} without" in words
    assert "attention dma (DynamicMaskAttention) computed by torch, chosen by auto: triton and flex train on" in words
    assert "step 2 sequences x 3 accumulated x 1 devices = 6 of 64 tokens, 384 tokens" in words
    flops = model.training_flops(64)
    assert f"FLOPs {flops:.3g} per token, forward and backward; {flops * 384:.3g} per step" in words
    assert f"run 3 steps, 1,152 tokens, {flops * 1152:.3g} FLOPs" in words
    assert (
        f"time at least {duration(flops * 1152 / peaks.peak_flops(torch.device('cpu'), torch.float32)[0])}, at a"
        in words
    )
    assert re.search(r"estimated time: \d+ s \(1 steps x [\d,]+ ms, without validation\)", words)


def test_without_a_terminal_there_are_lines_instead_of_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, "--trainer.max_steps=8", "--trainer.log_every_n_steps=3", "--trainer.val_check_interval=4")
    out = capsys.readouterr().out
    assert not re.search(r"\r|it/s|Epoch 0", out)
    lines = [line for line in out.splitlines() if line.startswith("step ") and "sequences" not in line]
    figures, left = r"loss \d\.\d+, [\d,]+ tokens/s", r"(\d+ min )?\d+ s left"
    validation = r"validation: val/loss \d\S*, val/perplexity \S+, val/accuracy \S+, val/bits_per_byte \d\S*"
    expected = [f"step 0, {validation}", f"step 3 of 8, {figures}, {left}", f"step 4 of 8, {validation}"]
    expected += [f"step 6 of 8, {figures}, {left}", f"step 8 of 8, {figures}, 0 s left", f"step 8 of 8, {validation}"]
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    assert "attention   " in out  # the table of the run is there all the same


def test_in_a_terminal_there_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(tmp_path, "--run_summary=null")
    out = capsys.readouterr().out
    assert re.search(r"Epoch 0: .*\| 3/3 \[", out)
    assert "step " not in out


def test_lines_are_as_many_as_one_reads() -> None:
    assert {x: _steps_between(x) for x in (3, 99, 1000, 13_500, None)} == {3: 1, 99: 2, 1000: 20, 13_500: 20, None: 20}


def test_tensorboard_has_a_page_with_the_curves_that_matter_first(
    dma: EventAccumulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(read: EventAccumulator) -> dict[str, dict[str, set[str]]]:
        (event,) = read.Tensors("custom_scalars__config__")
        layout = Layout.FromString(event.tensor_proto.string_val[0])
        known = read.Tags()["scalars"]
        return {
            category.title: {
                chart.title: {tag for tag in known for x in chart.multiline.tag if re.match(x, tag)}  # as TensorBoard
                for chart in category.chart
            }
            for category in layout.category
        }

    run, layers = (page(dma)[name] for name in ("Run", "Layers"))
    assert list(page(dma)) == ["Run", "Layers"]
    assert list(run)[:6] == ["loss", "perplexity", "bits per byte", "accuracy", "learning rate", "tokens per second"]
    assert (run["loss"], run["learning rate"]) == ({"train/loss", "val/loss"}, {"lr-AdamW/pg1", "lr-AdamW/pg2"})
    assert run["tokens per second"] == {"speed/tokens_per_s"}
    assert all(run.values())
    # They have 64 positions and w = 16, so that each layer has all of its figures.
    assert layers == {name: {f"dma/layer_{i}/{name}" for i in (0, 1)} for name in layers}
    fit(tmp_path, "--model.attention=mha", "--trainer.max_steps=1")
    assert list(page(events(tmp_path))) == ["Run"]
    assert f"tensorboard --logdir {tmp_path}/cpu/version_0, then http://localhost:6006/#" in capsys.readouterr().out


def test_duration() -> None:
    seconds = {0.4: "0 s", 45: "45 s", 200: "3 min 20 s", 3900: "1 h 5 min", 97_200: "1 d 3 h"}
    assert {x: duration(x) for x in seconds} == seconds


def test_every_mixer_says_what_computes_it() -> None:
    with torch.device("meta"):
        mixers = {name: DogeForCausalLM(ModelConfig(attention=name)).layers[0].self_attn for name in MIXERS}
    said = {name: mixer.computed_by(torch.device("cpu"), torch.float32) for name, mixer in mixers.items()}
    assert said["dma"] == said["swa"] == explain_backend("auto", "cpu", None, torch.float32, 32)
    assert said["nsa"].endswith("selected blocks by plain PyTorch")
    assert "scaled_dot_product_attention" in said["mha"]
    assert explain_backend("flex", "cpu", None, torch.float32, 32) == "flex, as asked for"
