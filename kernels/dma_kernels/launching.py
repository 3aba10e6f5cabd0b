"""Connects custom operations to their Triton kernels.

On CUDA, an operation imports its kernels when it first runs, so importing this package does not need Triton. It
launches them on the GPU where its tensors are.

PyTorch's dispatcher and what `torch.library` puts around an operation take the CPU longer than launching the kernels.
So outside torch.compile, `call` and `dispatched` let operations run without it.
"""

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import Parameter
from torch.utils._triton import has_triton

Implementation = Callable[..., Any]

_LAUNCHES: dict[CustomOpDef, Implementation] = {}  # what the operations do on CUDA


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
        def on_cuda(*arguments: Any) -> Any:
            if without_triton is None or has_triton():  # called only here, since it imports Triton
                return guarded(*arguments)
            return without_triton(*arguments)

        _LAUNCHES[operation] = on_cuda
        return launch

    return register


def dispatched(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors needs the dispatcher, because something besides autograd must see it.

    torch.compile, dispatch modes, transforms of `torch.func` and tensor subclasses must see it.
    """
    if torch.compiler.is_compiling():
        return True
    included = torch._C._dispatch_tls_is_dispatch_key_included
    if included(torch._C.DispatchKey.Python) or included(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode):
        return True
    return any(type(x) not in (Tensor, Parameter, NoneType) for x in tensors)


def call(operation: CustomOpDef, first: Tensor, *others: Any) -> Any:
    """`operation(first, *others)` without a gradient; on CUDA without the dispatcher, if nothing must see the call."""
    tensors = (x for x in others if isinstance(x, Tensor))
    if dispatched(first, *tensors) or not first.is_cuda:
        return operation(first, *others)
    with torch.no_grad():
        return _LAUNCHES[operation](first, *others)
