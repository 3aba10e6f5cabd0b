"""How custom operations come to their Triton kernels.

An operation on CUDA imports its kernels when it first runs, so importing this package needs no Triton, and launches
them on the GPU of its tensors.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._triton import has_triton

Implementation = Callable[..., Any]


def on_device_of_first(function: Implementation) -> Implementation:
    """The function with the GPU of its first argument as the current one, on which Triton launches."""

    @functools.wraps(function)
    def guarded(first: Tensor, *others: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):  # changes nothing for a tensor on the CPU
            return function(first, *others, **options)

    return guarded


def register_launch(
    operation: CustomOpDef, *, without_triton: Implementation | None = None
) -> Callable[[Implementation], Implementation]:
    """Let the decorated function, which launches kernels, be what an operation does on CUDA.

    Args:
        operation: of `torch.library.custom_op`; the function that defines it remains in use on other devices.
        without_triton: used instead where there is no Triton for the GPU; by default kernels are launched, or fail.
    """

    def register(launch: Implementation) -> Implementation:
        guarded = on_device_of_first(launch)

        @operation.register_kernel("cuda")
        def _(*arguments: Any) -> Any:
            if without_triton is None or has_triton():  # not asked before, since it imports Triton
                return guarded(*arguments)
            return without_triton(*arguments)

        return launch

    return register
