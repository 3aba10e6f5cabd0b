"""Several processes read a long prompt together, and the last one goes on alone.

Each process reads consecutive tokens. A layer's cache has a constant size, so it goes from process to process:

    process 0  layer 0 | layer 1 | layer 2 |
    process 1            layer 0 | layer 1 | layer 2 |      each starts a layer with the cache of the process before
    process 2                      layer 0 | layer 1 | layer 2 |

With L layers and P processes, this takes the time of L + P - 1 layers over N / P tokens each.

B batch, N prompt length, L layers, P processes, V vocabulary.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dma_kernels.context import ContextGroup
from dma_kernels.context.collectives import process_group
from dma_lightning.mixers.base import MixerCache


def read_together(
    read: Callable[..., Tensor],
    input_ids: Tensor,
    padding: Tensor | None,
    cache: Sequence[MixerCache],
    context: ContextGroup,
) -> Tensor:
    """Read prompts; all processes of the group call it with the same whole prompts.

    Afterwards, the caches of the last process are those of the whole prompts. Those of the others end with their parts.
    If P does not divide N, the parts of the first processes are longer by one token.

    Args:
        read: a decoder, such as `DogeForCausalLM`, in evaluation mode.
        input_ids: int64 `[B, N]`, N >= P.
        padding: bool `[B, N]`, True at the padded positions on the left; None if there are none.
        cache: empty caches of all layers, of constant size (`dma` or `swa`).
        context: the processes.

    Returns:
        Logits after the part of this process, `[B, V]`; in the last process, those of the first new token.

    Raises:
        ValueError: if there are fewer tokens than processes, or the model's attention needs all earlier keys.
    """
    if input_ids.shape[1] < context.size:
        raise ValueError(
            f"input_ids: expected at least {context.size} positions for {context.size} processes, got "
            f"{input_ids.shape[1]}; read short prompts in one process"
        )
    check_divides(read, context)
    part = input_ids.tensor_split(context.size, dim=1)[context.rank]
    padded = None if padding is None else padding.tensor_split(context.size, dim=1)[context.rank]
    passed = _PassedCaches(cache, context)
    logits = read(part, padding=padded, cache=passed, last_only=True)
    for message in passed.sent:
        message.wait()
    return logits[:, -1]


def check_divides(model: Any, context: ContextGroup) -> None:
    """Raise `ValueError` if a model that can tell says that its attention cannot divide sequences."""
    if hasattr(model, "join_context"):
        before = model.context
        model.join_context(context)
        model.join_context(before)


class _PassedCaches(Sequence[MixerCache]):
    """The caches of all layers: each comes from the process before when its layer begins, and then goes to the next."""

    def __init__(self, caches: Sequence[MixerCache], context: ContextGroup) -> None:
        self.caches, self.context = caches, context
        self.sent: list[Any] = []

    def __len__(self) -> int:
        return len(self.caches)

    def __getitem__(self, layer: Any) -> Any:
        return self.caches[layer]

    def __iter__(self) -> Iterator[MixerCache]:
        for cache in self.caches:
            device = cache.length.device
            if self.context.rank > 0:
                _take_over(cache, self._receive(device))
            yield cache
            if self.context.rank + 1 < self.context.size:
                self._send(cache, device)

    def _receive(self, device: torch.device) -> Any:
        group, before, place = process_group(self.context.name), self.context.rank - 1, self._place(device)
        size = torch.zeros(1, dtype=torch.int64, device=place)
        dist.recv(size, group=group, group_src=before)
        message = torch.zeros(int(size.item()), dtype=torch.uint8, device=place)
        dist.recv(message, group=group, group_src=before)
        content = io.BytesIO(message.cpu().numpy().tobytes())
        return torch.load(content, map_location=device, weights_only=False)  # from this group, not from a file

    def _send(self, cache: MixerCache, device: torch.device) -> None:
        group, after, content = process_group(self.context.name), self.context.rank + 1, io.BytesIO()
        torch.save(cache, content)
        message = torch.frombuffer(content.getbuffer(), dtype=torch.uint8).to(self._place(device))
        size = torch.tensor([len(message)], device=message.device)
        for x in (size, message):
            self.sent.append(dist.isend(x, group=group, group_dst=after))

    def _place(self, device: torch.device) -> torch.device:
        """Where messages are: gloo sends from the CPU."""
        return torch.device("cpu") if dist.get_backend(process_group(self.context.name)) == "gloo" else device


def _take_over(own: Any, given: Any) -> None:
    """Give a cache the state of another one of its kind."""
    for name, x in vars(given).items():
        if name == "keys":
            _take_over(own.keys, x)
        elif name != "device":
            setattr(own, name, x)
