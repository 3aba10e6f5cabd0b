"""The part of a batch that each process of a context group takes.

B batch, N length, P processes, n length of a part.
"""

from typing import cast

import torch
from torch import Tensor

from dma_kernels.context import ContextGroup
from dma_lightning.data.base import IGNORE_INDEX, Batch

_FILLS = {"input_ids": 0, "labels": IGNORE_INDEX, "documents": 0, "padding": True}


def part_of_batch(batch: Batch, context: ContextGroup) -> Batch:
    """The part of a batch that this process takes; all processes of the group have the same whole batch.

    Labels have already been shifted, so the label of a part's last position is a token of the next part. If P does not
    divide N, the end is filled up with padding. Only the first process gets the `label_bytes` of the whole sequences;
    the others get 0.

    Raises:
        ValueError: if the batch has answers, which are right or wrong as a whole.
    """
    if "is_answer" in batch:
        raise ValueError(
            "data: expected text where processes divide sequences (context_parallel_size), got examples with answers, "
            "which are right or wrong as a whole; use other data, or context_parallel_size 1"
        )
    whole = cast("dict[str, Tensor]", dict(batch))
    rows, length = whole["input_ids"].shape
    if length % context.size and "padding" not in whole:
        whole["padding"] = torch.zeros(rows, length, dtype=torch.bool, device=whole["input_ids"].device)
    part = {name: context.part(x, fill=_FILLS[name]) for name, x in whole.items() if name in _FILLS}
    if "label_bytes" in whole:
        part["label_bytes"] = whole["label_bytes"] * (context.rank == 0)
    return cast("Batch", part)
