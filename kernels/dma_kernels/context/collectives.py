"""An all-gather of tensors of several dtypes in one message; its gradient is a reduce-scatter.

P processes of a group.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dma_kernels.context.traffic import traffic

_ALIGNMENT = 16  # bytes at which each tensor begins in a message
_GROUPS: dict[str, dist.ProcessGroup] = {}  # operations take names, and modules that hold names can be copied


def register_group(group: dist.ProcessGroup) -> str:
    """The name by which operations find a group."""
    _GROUPS[group.group_name] = group
    return group.group_name


def process_group(name: str) -> dist.ProcessGroup:
    """The group that `register_group` gave this name."""
    return _GROUPS[name]


@torch.library.custom_op("dma_kernels::gather_parts", mutates_args=())
def gather_parts(parts: Sequence[Tensor], group: str, size: int) -> list[Tensor]:
    """Tensors of all processes; differentiable. All processes call it with the same shapes and dtypes.

    The gradient of a tensor is summed over all processes, in at least float32.

    Args:
        parts: tensors of any dtypes and shapes.
        group: name from `register_group`.
        size: P.

    Returns:
        The tensors of all processes, `[P, ...]` for each of `parts`, in the order of the processes.
    """
    messages = [_as_bytes(part) for part in parts]
    sent = torch.cat(messages)
    received = sent.new_empty(size * len(sent))
    with traffic.counted(size, sent.nbytes, sent.device):
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(received, sent, group=_GROUPS[group])
    chunks = received.view(size, -1).split([len(message) for message in messages], dim=1)
    found = (chunk[:, : part.nbytes].view(part.dtype) for chunk, part in zip(chunks, parts, strict=True))
    # Results of an operation must not share memory, so each is copied out of the message.
    return [
        x.clone(memory_format=torch.contiguous_format).view(size, *part.shape)
        for x, part in zip(found, parts, strict=True)
    ]


@gather_parts.register_fake
def _(parts: Sequence[Tensor], group: str, size: int) -> list[Tensor]:
    return [part.new_empty(size, *part.shape) for part in parts]


@torch.library.custom_op("dma_kernels::sum_parts", mutates_args=())
def sum_parts(parts: Sequence[Tensor], group: str, size: int) -> list[Tensor]:
    """Sums over all processes of entry p, where p is this process, of floating tensors `[P, ...]`."""
    sums: list[Tensor] = [part[0] for part in parts]
    for dtype in sorted({part.dtype for part in parts}, key=str):
        numbers = [number for number, part in enumerate(parts) if part.dtype == dtype]
        sent = torch.cat([parts[number].flatten(1) for number in numbers], dim=1)
        received = sent.new_empty(sent.shape[1])
        reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        with traffic.counted(size, received.nbytes, sent.device):
            reduce_scatter(received, sent.flatten(), group=_GROUPS[group])
        sizes = [parts[number][0].numel() for number in numbers]
        for number, total in zip(numbers, received.split(sizes), strict=True):
            sums[number] = total.view(parts[number].shape[1:]).clone()
    return sums


@sum_parts.register_fake
def _(parts: Sequence[Tensor], group: str, size: int) -> list[Tensor]:
    return [part.new_empty(part.shape[1:]) for part in parts]


def _as_bytes(part: Tensor) -> Tensor:
    """The bytes of a tensor, filled up so that the next tensor is aligned."""
    message = part.contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(message, (0, -len(message) % _ALIGNMENT))


def _note(ctx: Any, inputs: tuple[Sequence[Tensor], str, int], output: list[Tensor]) -> None:
    parts, ctx.group, ctx.size = inputs
    ctx.dtypes = [part.dtype for part in parts]


def _gradient(ctx: Any, gradients: list[Tensor]) -> tuple[list[Tensor | None], None, None]:
    floating = [number for number, dtype in enumerate(ctx.dtypes) if dtype.is_floating_point]
    wide = [gradients[i].to(torch.promote_types(ctx.dtypes[i], torch.float32)) for i in floating]
    result: list[Tensor | None] = [None] * len(gradients)
    for i, total in zip(floating, sum_parts(wide, ctx.group, ctx.size), strict=True):
        result[i] = total.to(ctx.dtypes[i])
    return result, None, None


gather_parts.register_autograd(_gradient, setup_context=_note)
