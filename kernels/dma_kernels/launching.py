"""Connects custom operations to their Triton kernels.

On CUDA, an operation imports its kernels when it first runs, so importing this package does not need Triton. It
launches them on the GPU where its tensors are.
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
    """Make the GPU of the first argument current while a function runs, since Triton launches on the current GPU."""

    @functools.wraps(function)
    def guarded(first: Tensor, *others: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):  # changes nothing for a tensor on the CPU
            return function(first, *others, **options)

    return guarded


def register_launch(
    operation: CustomOpDef, *, without_triton: Implementation | None = None
) -> Callable[[Implementation], Implementation]:
    """Decorate the function that launches an operation's kernels: the operation calls it on CUDA.

    Args:
        operation: made by `torch.library.custom_op`; other devices still use the function that defines it.
        without_triton: used instead if there is no Triton for the GPU. By default, the launch then fails.
    """

    def register(launch: Implementation) -> Implementation:
        guarded = on_device_of_first(launch)

        @operation.register_kernel("cuda")
        def _(*arguments: Any) -> Any:
            if without_triton is None or has_triton():  # called only here, since it imports Triton
                return guarded(*arguments)
            return without_triton(*arguments)

        return launch

    return register
