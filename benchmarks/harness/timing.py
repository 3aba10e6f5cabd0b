"""Time and memory of functions on a GPU. B batch, H heads, N length, D head dim."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

REPEATS = 3


def spread(values: Iterable[float]) -> list[float]:
    """Minimum, median and maximum."""
    ordered = sorted(values)
    return [ordered[0], statistics.median(ordered), ordered[-1]]


def event_ms(function: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each of several calls, measured by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def time_ms(function: Callable[[], Any]) -> list[float]:
    """Minimum, median and maximum of repeated measurements in milliseconds. A first one is discarded."""
    from triton.testing import do_bench  # here, since pages can be written without Triton

    function()
    times = event_ms(function, REPEATS)
    if min(times) < 30:  # a single run is precise enough only if it is long
        times = [do_bench(function, warmup=10, rep=40, return_mode="median") for _ in range(REPEATS)]
    return spread(times)


def forward_and_backward_ms(function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> dict[str, list[float]]:
    """Time of the forward, as in training, and of the backward, with gradients of the inputs."""
    out = function()
    grad = torch.randn_like(out)
    backward = time_ms(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    return {"forward": time_ms(function), "backward": backward}


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """Capture a function as a CUDA graph; the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_gib(function: Callable[[], Any]) -> float:
    """Peak GPU memory of a call beyond what is allocated before it, in GiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def check_equal(found: Sequence[Tensor], expected: Sequence[Tensor], name: str, tolerance: float = 0.02) -> None:
    """Before anything is timed: check that outputs and gradients in bfloat16 are as expected.

    Raises:
        RuntimeError: if the norm of a difference exceeds the tolerance times the norm of the expected tensor.
    """
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        error = ((x - y).float().norm() / y.float().norm()).item()
        if not error < tolerance:
            raise RuntimeError(
                f"{name}, tensor {i} of {len(found)}: relative error {error:.3g}, expected below {tolerance}"
            )
