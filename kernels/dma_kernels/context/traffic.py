"""What the collectives of this process send and receive, and how long they take on a GPU. P processes of a group."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Traffic:
    """Counts what the collectives of a process do.

    Attributes:
        bytes: bytes sent to other processes and received from them since the process began.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._timed = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def counted(self, size: int, nbytes: int, device: torch.device) -> Iterator[None]:
        """A context around one collective.

        Args:
            size: P.
            nbytes: bytes that each process sends to each other process: its message in an all-gather, or the share of
                one process in a reduce-scatter.
            device: where the message is.
        """
        self.bytes += 2 * (size - 1) * nbytes
        if not (self._timed and device.type == "cuda"):
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(device))
        yield
        end.record(torch.cuda.current_stream(device))
        self._events.append((begin, end))

    def start_timing(self) -> None:
        """Time all collectives on GPUs from here to `stop_timing`, without waiting for the device."""
        self._timed = True
        self._events.clear()

    def stop_timing(self) -> float:
        """Wait for the timed collectives; returns their milliseconds, including waiting for other processes."""
        self._timed = False
        milliseconds = 0.0
        for begin, end in self._events:
            end.synchronize()
            milliseconds += begin.elapsed_time(end)
        self._events.clear()
        return milliseconds


traffic = Traffic()
"""The traffic of this process."""
