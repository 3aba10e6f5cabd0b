"""New buffers filled with NaN or the largest integer, so that what a kernel does not write shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """A region in which `torch.empty` poisons what it makes."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4).isnan().all()
        assert (torch.empty(4, dtype=torch.int32) == 2**31 - 1).all()
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
