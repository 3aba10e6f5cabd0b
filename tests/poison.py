"""Fill new buffers with NaN or the largest integer, so that elements a kernel does not write show up."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """A context in which `torch.empty` poisons new tensors."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4).isnan().all()
        assert (torch.empty(4, dtype=torch.int32) == 2**31 - 1).all()
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
