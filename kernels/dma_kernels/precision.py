"""Computing in full precision inside somebody's autocast region."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A region in which matrix products keep the precision of their inputs."""
    if device.type == "meta":  # has no autocast; asking is_autocast_available would break the graph in torch 2.11
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
