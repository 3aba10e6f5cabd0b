"""What a finished run has logged, and what its checkpoint says about model and data."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.evidence.results import Record
from benchmarks.evidence.studies import Cell, Options
from benchmarks.harness.environment import describe
from dma_lightning.config import ModelConfig
from dma_lightning.language_model import LanguageModel
from dma_lightning.model import DogeForCausalLM
from dma_lightning.saved_run import SavedRun

_CURVES = ("val/", "dma/", "drift/")  # of other figures, only the last value is kept
_OF_THE_MACHINE = ("speed/", "memory/")
_DIGITS = 7  # significant digits of a float32


def record_of(
    cell: Cell, options: Options, configs: str, run: Path, seconds: float, evaluations: Mapping[str, Any]
) -> Record:
    """The record of a finished training.

    Args:
        cell: what was trained.
        options: its flags.
        configs: hash of its configurations.
        run: folder of the run, with event files and checkpoints.
        seconds: how long its processes ran.
        evaluations: results of the evaluations of its checkpoint, by command.

    Raises:
        ValueError: if there is no complete checkpoint.
    """
    saved = SavedRun.newest([run])
    if saved is None:
        raise ValueError(f"{run}: expected a checkpoint, got none")
    arguments = saved.model_arguments(LanguageModel)
    model = _model(arguments)
    length, batch = saved.data.arguments["sequence_length"], saved.data.arguments["batch_size"]
    scalars = read_scalars(run)
    return Record(
        task=cell.task,
        size=cell.size,
        form=cell.form,
        lr=cell.lr,
        seed=cell.seed,
        options=options,
        configs=configs,
        model=arguments,
        data={name: value for name, value in saved.data.arguments.items() if name not in _files(saved)},
        parameters=model.num_non_embedding_parameters,
        flops_per_token=model.training_flops(length),
        steps=saved.step,
        tokens=saved.step * batch * length * _accumulated(run),
        curves={name: curve for name, curve in scalars.items() if name.startswith(_CURVES)},
        last={name: x for name, [*_, (_, x)] in scalars.items() if x is not None and not name.startswith(_CURVES)},
        evaluations={name: _without_paths(report) for name, report in evaluations.items()},
        seconds=round(seconds, 1),
        environment=describe(),
    )


def read_scalars(run: Path) -> dict[str, list[tuple[int, float | None]]]:
    """Curves by tag: optimizer steps and values, None for values that are not finite.

    If a step was repeated after a restart, the later value counts.
    """
    reader = EventAccumulator(str(run), size_guidance={"scalars": 0})
    reader.Reload()
    curves = {}
    for tag in sorted(reader.Tags()["scalars"]):
        values = {event.step + 1: float(f"{event.value:.{_DIGITS}g}") for event in reader.Scalars(tag)}
        if not tag.startswith(_OF_THE_MACHINE):
            curves[tag] = [(step, x if math.isfinite(x) else None) for step, x in sorted(values.items())]
    return curves


def _accumulated(run: Path) -> int:
    """Batches per optimizer step, from the configuration that the run has written."""
    return yaml.safe_load((run / "config.yaml").read_text())["trainer"]["accumulate_grad_batches"]


def _model(arguments: Mapping[str, Any]) -> DogeForCausalLM:
    """A model with these arguments, without weights."""
    names = {field.name for field in fields(ModelConfig)}
    with torch.device("meta"):
        return DogeForCausalLM(ModelConfig(**{name: x for name, x in arguments.items() if name in names}))


def _files(saved: SavedRun) -> tuple[str, ...]:
    """Names of the data's arguments that are paths on this machine."""
    return saved.data.kind.file_arguments if saved.data.kind else ()


def _without_paths(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "checkpoint"}
