"""The mean loss of an optimizer step over all labels of its accumulated batches and of all processes.

Lightning and DDP weight batches equally, whatever their number of labels, and divide an incomplete group at the end of
an epoch by the full number of batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dma_lightning.metrics import quotient


@dataclass
class StepTotals:
    """Sums over the labels of a batch or step, each a scalar tensor in the dtype of the losses.

    Attributes:
        nats: sum of the losses.
        labels: number of labels.
        size: bytes of source text that the labels stand for; None if the data does not say.
    """

    nats: Tensor
    labels: Tensor
    size: Tensor | None

    @classmethod
    def of(cls, batches: list["StepTotals"], processes: int) -> "StepTotals":
        """The sum over the batches of this process and over all processes; all processes must call it."""
        if len(batches) == processes == 1:
            return batches[0]
        known = all(x.size is not None for x in batches)
        rows = [torch.stack([x.nats, x.labels, x.labels if x.size is None or not known else x.size]) for x in batches]
        totals = torch.stack(rows).sum(0)
        if processes > 1:
            torch.distributed.all_reduce(totals)
        nats, labels, size = totals
        return cls(nats, labels, size if known else None)

    @property
    def mean(self) -> Tensor:
        """Mean loss in nats; 0 for a step without labels."""
        return self.nats / self.labels.clamp(min=1)

    @property
    def nats_per_byte(self) -> Tensor:
        """Loss per byte of text, if the data counts bytes; NaN for a step whose labels stand for no text."""
        assert self.size is not None
        return quotient(self.nats, self.size)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place, without waiting for the device; `factor` is a scalar tensor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
