"""Training steps of whole models on random tokens, by a plain loop or through `dma-lightning fit`."""

import contextlib
import hashlib
import io
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.profilers import Profiler
from tokenizers import Tokenizer, models
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_lightning.callbacks import FitReport, MixedWindows
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.cli.entry import DMACLI, build_cli
from dma_lightning.data.manifests import MANIFEST, TOKENIZER, VERSION, Manifest
from dma_lightning.data.shards import ShardWriter, write_json, write_text

from .results import CONFIGS
from .timing import spread

TOKENS, LENGTHS, VOCABULARY = 32768, [4096, 16384, 32768], 32768  # tokens per step, cut into sequences of one length
CORPUS = 16 << 20  # tokens, of four bytes each
COMPILED, RECOMPUTED = "80m", "1.7b"  # shapes; the activations of the second do not fit, so they are recomputed
INTERVAL = {COMPILED: 20, RECOMPUTED: 4}  # steps per logged figure
COMPILING, FIGURES = 2, 3  # first figures, which do not count (kernels compile); then those that count
_LEFT_OUT = (ResumableCheckpoint, FitReport, MixedWindows)
SDPA = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Case(NamedTuple):
    """What is trained.

    Attributes:
        shape: name of a model config, such as `80m`.
        length: of sequences, in tokens.
        attention: name of a mixer.
        published: whether masks have the published form, rather than the form in the shape's own config.
    """

    shape: str
    length: int
    attention: str
    published: bool = True


class LoggedFigures(pl.Callback):
    """Collects speed and utilization as `SpeedMonitor` logs them."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            names = ("tokens_per_s", "mfu")
            self.figures.append({name: float(trainer.callback_metrics[f"speed/{name}"]) for name in names})

    def spreads(self) -> dict[str, list[float]]:
        """Minimum, median and maximum of the figures that count."""
        return {name: spread(row[name] for row in self.figures[COMPILING:]) for name in self.figures[0]}


def compile_ahead(compile_case: Callable[[Case], object], cases: Sequence[Case]) -> None:
    """Fill Inductor's cache for the measurements, with one process for each case. Errors are printed."""
    with ProcessPoolExecutor(len(cases), mp_context=multiprocessing.get_context("spawn")) as pool:
        for case, error in zip(cases, pool.map(partial(_error_of, compile_case), cases), strict=True):
            if error:
                print(f"{tuple(case)}: {error}", flush=True)


def _error_of(compile_case: Callable[[Case], object], case: Case) -> str | None:
    try:
        compile_case(case)
    except Exception as error:
        return str(error)[-300:]
    return None


def write_corpus(folder: Path) -> None:
    """Write random tokens in the format of `dma-lightning prepare`. The folder is created if it is missing."""
    folder.mkdir(exist_ok=True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")).to_str()
    write_text(folder / TOKENIZER, words)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=CORPUS)
    writer = ShardWriter(folder, 0, np.dtype("uint16"), with_lengths=True)
    writer.add(tokens, 4 * CORPUS, np.full(CORPUS, 4, np.uint8))
    writer.end_document(np.empty(0, np.uint16))
    manifest = Manifest(
        version=VERSION, tokenizer_sha256=hashlib.sha256(words.encode()).hexdigest(), vocab_size=VOCABULARY,
        dtype="uint16", text_field="text", eos_token_id=None, shard_tokens=CORPUS, files=[], tokens=CORPUS,
        documents=1, bytes=4 * CORPUS, shards=[writer.finish(0, 0)],
    )  # fmt: skip
    write_json(folder / MANIFEST, asdict(manifest))


def build(corpus: Path, case: Case, trainer: dict[str, Any], model: dict[str, Any]) -> DMACLI:
    """A run that has not started, on one GPU unless the trainer's options say otherwise.

    It writes no checkpoints and no report. It has no mixed windows either, so all steps are of one kind.

    Args:
        corpus: folder of `write_corpus`.
        case: what is trained, with configs/trainer/gpu.yaml.
        trainer: options of the trainer that differ from the configs, by name.
        model: options of the model that differ from the configs, by name.
    """
    names = (f"model/{case.shape}{'-published' if case.published else ''}", "data/prepared", "trainer/gpu")
    configs = [f"--config={CONFIGS / name}.yaml" for name in names]
    data = {"path": corpus, "sequence_length": case.length, "batch_size": TOKENS // case.length}
    options = {
        "data": data | {"separate_documents": False},
        "model": {"attention": case.attention, "compile_layers": True} | model,
        "trainer": {"devices": 1} | trainer,
    }
    flags = [
        f"--{part}.{name}={str(x).lower() if isinstance(x, bool) else x}"
        for part, values in options.items()
        for name, x in values.items()
    ]
    with torch.device("cuda"):  # where even 1.7 billion weights are drawn in no time
        cli = build_cli([*configs, *flags], run=False)
    cli.trainer.callbacks = [x for x in cli.trainer.callbacks if not isinstance(x, _LEFT_OUT)]
    return cli


def fit(
    corpus: Path,
    case: Case,
    watch: pl.Callback,
    trainer: dict[str, Any],
    *,
    graphs: bool,
    profiler: Profiler | None = None,
    **options: Any,
) -> None:
    """Train a new model; validation and checkpoints are off.

    Args:
        corpus: folder of `write_corpus`.
        case: what is trained, with configs/trainer/gpu.yaml.
        trainer: options of the trainer that differ from the configs, by name.
        watch: a callback that is called after all others.
        graphs: whether layers run as CUDA graphs.
        profiler: of the trainer.
        options: other options of the model that differ from the configs.
    """
    model = {"cuda_graphs": graphs, "activation_checkpointing": case.shape == RECOMPUTED} | options
    with tempfile.TemporaryDirectory() as runs:
        cli = build(corpus, case, {"limit_val_batches": 0, "logger.init_args.save_dir": runs} | trainer, model)
        if profiler is not None:
            cli.trainer.profiler = profiler
        cli.trainer.callbacks = [*cli.trainer.callbacks, watch]
        with sdpa_kernel(SDPA, set_priority=True), contextlib.redirect_stdout(io.StringIO()):
            cli.trainer.fit(cli.model, cli.datamodule)
