"""What the parts of a checkpoint must be, whoever wrote it."""

from typing import Annotated, Any, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from dma_lightning.reading import as_kind

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class _OptimizerState(TypedDict):
    state: dict[Any, dict[str, Any]]
    param_groups: list[dict[str, Any]]


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
        "lr_schedulers": list[dict[str, Any]],
        "rng_states": list[dict[str, Any]],
    },
    total=False,
)

# Callbacks of ours that save counts and figures alone.
_COUNTERS = {"DynamicMaskMonitor", "GradientGuard", "SampleMonitor", "SpeedMonitor"}


def check_content(content: Any) -> None:
    """Check the types of all parts that Lightning or we rely on.

    Raises:
        ValueError: if one is of another type, or a weight is not all in the file; without the path.
    """
    content = as_kind(content, _Content, "content")
    for name, state in content.get("callbacks", {}).items():
        if name.partition("{")[0] in _COUNTERS:
            as_kind(state, dict[str, int | float], f"callbacks.{name}")
    for name, weight in content.get("state_dict", {}).items():
        if not _is_whole(weight):
            raise ValueError(f"state_dict.{name}: expected {tuple(weight.shape)} numbers in the file, got fewer")


def _is_whole(weight: Tensor) -> bool:
    """Whether every number has a place of its own; else a small file could ask for any amount of memory."""
    if weight.layout != torch.strided or weight.is_meta:
        return False
    return weight.numel() * weight.element_size() <= weight.untyped_storage().nbytes()
