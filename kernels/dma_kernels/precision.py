"""Computing in full precision inside somebody's autocast region."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A region in which matrix products keep the precision of their inputs."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device, for example
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
