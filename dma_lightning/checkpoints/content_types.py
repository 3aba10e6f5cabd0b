"""Required types of a checkpoint's parts, whoever wrote it."""

from collections.abc import Iterator
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from dma_lightning.files.reading import Count, as_kind


class _OptimizerState(TypedDict):
    state: dict[Any, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _SchedulerState(TypedDict):
    """State of torch's `LambdaLR`, which would set any key given here as an attribute of itself."""

    last_epoch: Count
    _step_count: Count
    base_lrs: list[float]
    _last_lr: list[float]
    lr_lambdas: NotRequired[list[dict[str, float] | None]]
    _get_lr_called_within_step: NotRequired[bool]
    _is_initial: NotRequired[bool]
    verbose: NotRequired[bool]


_Content = TypedDict(
    "_Content",
    {
        "state_dict": dict[str, Tensor],
        "epoch": Count,
        "global_step": Count,
        "pytorch-lightning_version": str,
        "hyper_parameters": dict[str, Any],
        "datamodule_hyper_parameters": dict[str, Any],
        "callbacks": dict[str, dict[str, Any]],
        "loops": dict[str, dict[str, Any]],
        "optimizer_states": list[_OptimizerState],
        "lr_schedulers": list[_SchedulerState],
        "rng_states": list[dict[str, Any]],
    },
    total=False,
)

_PATHS = {"best_k_models", "best_model_path", "kth_best_model_path", "last_model_path"}  # names of Lightning's

# Our callbacks that save only counts and metrics.
_COUNTERS = {"DynamicMaskMonitor", "GradientGuard", "SampleMonitor", "SpeedMonitor"}


def check_content(content: Any) -> None:
    """Check the types of all parts that Lightning or this package relies on.

    Raises:
        ValueError: if a part has the wrong type, or the file holds only some of a weight's numbers; the message omits
            the path.
    """
    for scheduler in content.get("lr_schedulers", []) if isinstance(content, dict) else []:
        if isinstance(scheduler, dict) and (unknown := scheduler.keys() - _SchedulerState.__annotations__.keys()):
            raise ValueError(f"lr_schedulers: expected the state of LambdaLR, got {sorted(map(str, unknown))}")
    content = as_kind(content, _Content, "content")
    for name, state in content.get("callbacks", {}).items():
        if name.partition("{")[0] in _COUNTERS:
            as_kind(state, dict[str, int | float], f"callbacks.{name}")
    _check_progress(content.get("loops", {}), "loops")
    for name, tensor in _tensors(content):
        if not is_whole(tensor):
            raise ValueError(f"{name}: expected {tuple(tensor.shape)} numbers in the file, got fewer")


def _check_progress(value: Any, what: str) -> None:
    """Check that Lightning's progress counts are numbers, at any depth.

    Raises:
        ValueError: if one is not a number.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        _check_progress(inner, f"{what}.{name}")
    if not isinstance(value, dict | list | int | float | None):
        raise ValueError(f"{what}: expected a number, got {type(value).__name__}")


def _tensors(content: _Content) -> Iterator[tuple[str, Tensor]]:
    """Weights and moments, each with its place in the checkpoint."""
    for name, weight in content.get("state_dict", {}).items():
        yield f"state_dict.{name}", weight
    for number, optimizer in enumerate(content.get("optimizer_states", [])):
        for key, moments in optimizer["state"].items():
            for name, moment in moments.items():
                if isinstance(moment, Tensor):
                    yield f"optimizer_states.{number}.state.{key}.{name}", moment


def forget_paths(content: dict[str, Any]) -> None:
    """Drop the paths of files that callbacks wrote: a resumed callback may delete these files, wherever they are.

    `ResumableCheckpoint` keeps its paths, because it deletes files only in its own folder.
    """
    for name, state in content.get("callbacks", {}).items():
        if name.partition("{")[0] != "ResumableCheckpoint":
            state.update({key: type(state[key])() for key in _PATHS & state.keys()})


def is_whole(weight: Tensor) -> bool:
    """Whether every number is stored separately; otherwise a small file could request any amount of memory."""
    if weight.layout != torch.strided or weight.is_meta:
        return False
    return weight.numel() * weight.element_size() <= weight.untyped_storage().nbytes()
