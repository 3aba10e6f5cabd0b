"""Full precision inside a caller's autocast region."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which matrix products keep the precision of their inputs."""
    if device.type == "meta":  # no autocast there; in torch 2.11, is_autocast_available would break the graph
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast_cache(device: torch.device) -> AbstractContextManager:
    """A context in which the caller's autocast casts a weight again in each use, so gradients add up in its dtype."""
    if device.type == "meta":
        return nullcontext()
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False)
