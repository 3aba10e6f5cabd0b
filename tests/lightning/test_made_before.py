"""What earlier code wrote still works: checkpoints and configurations. So do imports and mixers written for it."""

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import old_run
import pytest
import torch
from old_run import CHECKPOINT, FOLDER, generated, resumed, validated
from torch import Tensor, nn

from dma_lightning import MIXERS, DogeForCausalLM, LanguageModel, ModelConfig, MQARDataModule, TokenMixer
from dma_lightning.callbacks import GradientGuard
from dma_lightning.cli import build_cli
from dma_lightning.data import SequenceDataModule
from dma_lightning.huggingface.config import beyond_doge
from dma_lightning.trained_models import load_checkpoint

PUBLIC = {
    "dma_lightning": (
        "MIXERS", "ByteTokenizer", "DogeForCausalLM", "DynamicMaskAttention", "FileTokenizer", "LanguageModel",
        "LatentAttention", "MQARDataModule", "ModelConfig", "MultiHeadAttention", "NativeSparseAttention",
        "PreparedDataModule", "Sampling", "SlidingWindowAttention", "TextDataModule", "TokenMixer", "generate",
        "load_doge", "pad_prompts", "save_doge", "stream_text", "stream_tokens",
    ),
    "dma_lightning.model": ("DogeForCausalLM", "ModelConfig"),
    "dma_lightning.callbacks": ("ContinuationWriter", "FitReport"),
    "dma_lightning.stability": ("GradientGuard", "UnstableTrainingError"),
    "dma_lightning.checkpoint_files": ("AtomicCheckpointIO",),
    "dma_lightning.checkpoints": ("ResumableCheckpoint",),
    "dma_lightning.strategies": ("FullyShardedStrategy",),
    "dma_lightning.cli": ("DMACLI", "build_cli", "main"),
    "dma_lightning.huggingface": ("load_doge", "save_doge"),
    "dma_lightning.data": (
        "IGNORE_INDEX", "Batch", "MQARDataModule", "MQARTask", "PreparedDataModule", "SequenceDataModule",
        "TextDataModule",
    ),
    "dma_lightning.monitoring": (
        "DynamicMaskMonitor", "FinalMetrics", "ProgressBar", "RunSummary", "SampleMonitor", "SpeedMonitor",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write to a temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """The figures that the code of that time computed."""
    return json.loads((FOLDER / "figures.json").read_text())


def test_validate_gives_the_figures_of_that_time(figures: dict[str, Any]) -> None:
    found = validated(FOLDER)
    assert {name: found[name] for name in figures["validate"]} == pytest.approx(figures["validate"], rel=1e-6)


def test_fit_goes_on_with_the_losses_of_that_time(figures: dict[str, Any]) -> None:
    found = resumed(FOLDER)
    assert found.keys() >= figures["resume"].keys()
    for name, losses in figures["resume"].items():
        assert found[name] == pytest.approx(losses, rel=1e-6), name


def test_generate_writes_the_text_of_that_time(figures: dict[str, Any]) -> None:
    assert generated(FOLDER) == figures["generate"]


def test_the_guard_has_its_class_path_of_that_time() -> None:
    config = FOLDER / "config.yaml"
    assert "class_path: dma_lightning.stability.GradientGuard" in config.read_text()
    cli = build_cli(["fit", f"--config={config}", "--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0"])
    assert sum(isinstance(callback, GradientGuard) for callback in cli.trainer.callbacks) == 1


@pytest.mark.parametrize("load", [LanguageModel.load_from_checkpoint, lambda path: load_checkpoint(path, "cpu")])
def test_its_model_comes_out_of_it(load: Any) -> None:
    module = load(FOLDER / CHECKPOINT)
    sizes = {name: getattr(module.model.config, name) for name in old_run.MODEL}
    assert sizes == old_run.MODEL
    saved = torch.load(FOLDER / CHECKPOINT, weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(module.state_dict()), dict(saved), rtol=0, atol=0)
    assert module.eval().model.generate(torch.tensor([[3, 20, 5]]), max_new_tokens=4).shape == (1, 4)


@pytest.mark.parametrize("load", [LanguageModel.load_from_checkpoint, lambda path: load_checkpoint(path, "cpu")])
def test_without_the_new_fields_it_has_the_published_form(load: Any) -> None:
    arguments = torch.load(FOLDER / CHECKPOINT, weights_only=True)["hyper_parameters"]
    assert not {"drift", "content", "content_in_bias", "wide_layers", "retention_weight"} & arguments.keys()
    config = load(FOLDER / CHECKPOINT).model.config
    assert beyond_doge(config) == {}
    assert (config.score_form, config.drift, config.retention_weight) == ("exp", "none", 0.0)


@pytest.mark.parametrize("kind", [SequenceDataModule, MQARDataModule])
def test_its_data_come_out_of_it(kind: type[SequenceDataModule]) -> None:
    data = kind.load_from_checkpoint(FOLDER / CHECKPOINT)
    assert type(data) is MQARDataModule
    assert {name: data.hparams[name] for name in old_run.DATA} == old_run.DATA


@pytest.mark.parametrize("module", PUBLIC)
def test_its_imports_work(module: str) -> None:
    for name in PUBLIC[module]:
        assert hasattr(import_module(module), name), name


def test_files_name_no_place_of_the_machine_that_made_them() -> None:
    content = torch.load(FOLDER / CHECKPOINT, weights_only=True)
    (saving,) = (state for name, state in content["callbacks"].items() if name.startswith("ResumableCheckpoint"))
    assert saving["dirpath"] == "runs/before/version_0/checkpoints"
    for file in FOLDER.rglob("*.*"):
        if file.is_file():
            assert not {word for word in (b"/home", b"/root", b"/tmp", b"/usr") if word in file.read_bytes()}, file


class OldCache:
    """A cache of sums over the tokens read, in the old form."""

    def __init__(self, batch: int, size: int) -> None:
        self.total, self.length = torch.zeros(batch, 1, size), torch.zeros(batch).long()

    def select(self, rows: Tensor) -> None:
        self.total, self.length = self.total[rows], self.length[rows]


def make_old_mixer() -> type[TokenMixer]:
    """The mixer from an old README, as it was."""

    class OldMixer(TokenMixer):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size, self.proj = size, nn.Linear(size, size)

        @classmethod
        def of_config(cls, config: Any, factor: int = 1) -> "OldMixer":
            mixer = cls(config.hidden_size)
            mixer.factor = factor
            return mixer

        def forward(
            self, x: Tensor, documents: Any = None, padding: Any = None, cache: OldCache | None = None
        ) -> Tensor:
            total, count = x.cumsum(1), torch.arange(1, x.shape[1] + 1)[:, None]
            if cache is not None:
                total, count = total + cache.total, count + cache.length[:, None, None]
                cache.total, cache.length = total[:, -1:], cache.length + x.shape[1]
            return self.proj(total / count)

        def new_cache(self, batch: int, full: bool = False) -> OldCache:
            return OldCache(batch, self.size)

        def mixing_flops(self, length: int) -> float:
            return self.size

        def cache_elements(self, length: int) -> int:
            return self.size

    return OldMixer


def test_a_mixer_of_that_time_works_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        FutureWarning, match=r"OldMixer: of_config is called from_config and forward takes `packing` .* now"
    ) as warned:
        kind = make_old_mixer()
    assert len(warned) == 1
    monkeypatch.setitem(MIXERS, "old", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = DogeForCausalLM(ModelConfig(attention="old", attention_args={"factor": 2}))
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape == (1, 5)
    mixer = model.layers[0].self_attn
    assert (type(mixer), mixer.factor) == (kind, 2)
