"""Full precision inside a caller's autocast region."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which matrix products keep the precision of their inputs."""
    if device.type == "meta":  # no autocast there; in torch 2.11, is_autocast_available would break the graph
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
