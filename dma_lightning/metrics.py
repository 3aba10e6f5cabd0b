"""Metrics of validation and test: mean loss, perplexity, accuracy of tokens and answers, bits per byte."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from dma_lightning.data.base import IGNORE_INDEX, Batch


def bits_per_byte(nats_per_byte: Tensor) -> Tensor:
    """Convert nats per byte."""
    return nats_per_byte / math.log(2)


def quotient(total: Tensor, count: Tensor) -> Tensor:
    """A sum divided by its number of terms; NaN if there are none."""
    return total / count.masked_fill(count == 0, torch.nan)


class MeanLoss(Metric):
    """Sum of token losses in nats, divided by the number of tokens.

    A NaN in the losses gives NaN. (torchmetrics' `MeanMetric` drops NaNs and is cast to half precision with the model.)
    Sums are compensated (Kahan), because not every device has float64.
    """

    sums: Tensor
    excess: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, dtype=torch.float32), dist_reduce_fx="sum")  # losses, tokens
        self.add_state("excess", torch.zeros(2, dtype=torch.float32), dist_reduce_fx="sum")  # rounding error of sums

    def update(self, nats: Tensor, count: Tensor) -> None:
        """Add the sum of losses over `count` tokens."""
        added = torch.stack([nats, count]).float() - self.excess
        sums = self.sums + added
        self.excess = ((sums - self.sums) - added).nan_to_num(0, 0, 0)  # infinities; the sums still keep a NaN
        self.sums = sums

    def compute(self) -> Tensor:
        return quotient(*(self.sums - self.excess))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        """Move to another device, but keep float32 whatever the model's dtype becomes."""
        return super()._apply(lambda x: fn(x).to(x.dtype), *args)


class Perplexity(MeanLoss):
    """Exponential of the mean loss; infinite only if that mean is infinite, or above 88 (in float32).

    (torchmetrics' `Perplexity` is infinite as soon as one token's probability is below the smallest float.)
    """

    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(MeanLoss):
    """Sum of token losses in bits, divided by the bytes of source text that their labels span (the `count`)."""

    def compute(self) -> Tensor:
        return bits_per_byte(super().compute())


class AnswerAccuracy(Metric):
    """Share of answers whose tokens are all the likeliest at their positions, given the true tokens before them."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")  # right answers, answers

    def update(self, predictions: Tensor, labels: Tensor, is_answer: Tensor) -> None:
        """Add sequences `[B, N]`. Only those count that `is_answer` `[B]` marks and that have a label."""
        labeled = labels != IGNORE_INDEX
        counts = is_answer & labeled.any(-1)
        right = counts & ((predictions == labels) | ~labeled).all(-1)
        self.counts = self.counts + torch.stack([right.sum(), counts.sum()])

    def compute(self) -> Tensor:
        return quotient(*self.counts.float())


class GroupAccuracy(AnswerAccuracy):
    """`AnswerAccuracy` over the examples of one group.

    Args:
        key: key of `Batch`, int64 `[B]`.
        value: the group's value of that key.
    """

    def __init__(self, key: str, value: int) -> None:
        super().__init__()
        self.key, self.value = key, value


class EvaluationMetrics(nn.ModuleDict):
    """The metrics of validation and test, by name.

    Args:
        vocab_size: V, number of different tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        # Validating its arguments would wait for the device.
        accuracy = MulticlassAccuracy(vocab_size, average="micro", ignore_index=IGNORE_INDEX, validate_args=False)
        figures = {"loss": MeanLoss(), "perplexity": Perplexity(), "accuracy": accuracy, "bits_per_byte": BitsPerByte()}
        super().__init__(figures | {"answers": AnswerAccuracy()})

    def split_answers(self, groups: Mapping[str, Sequence[int]]) -> None:
        """Also report answers by these groups, instead of by any earlier groups.

        Args:
            groups: keys of `Batch`, with the values of each that form a group.
        """
        for name in [name for name, metric in self.items() if isinstance(metric, GroupAccuracy)]:
            del self[name]
        for key, values in groups.items():
            self.update({f"answers/{key}_{value}": GroupAccuracy(key, value) for value in values})

    def reset(self) -> None:
        """Reset all metrics."""
        for metric in self._metrics():
            metric.reset()

    def add(self, batch: Batch, predictions: Tensor, nats: Tensor, count: Tensor) -> Iterator[tuple[str, Metric]]:
        """Add a batch to each metric that applies to it; yields these metrics with their names.

        The keys of the batch alone decide which apply, so that all processes report the same metrics.

        Args:
            batch: inputs and labels `[B, N]`.
            predictions: the likeliest tokens, int64 `[B, N]`.
            nats: sum of the losses of all labels.
            count: number of labels.
        """
        labels, tensors = batch["labels"], cast("dict[str, Tensor]", batch)
        for name, metric in zip(self, self._metrics(), strict=True):
            if isinstance(metric, BitsPerByte):
                if "label_bytes" not in batch:
                    continue
                metric.update(nats, batch["label_bytes"].sum(dtype=nats.dtype))
            elif isinstance(metric, MeanLoss):
                metric.update(nats, count)
            elif isinstance(metric, GroupAccuracy):
                if not {"is_answer", metric.key} <= tensors.keys():
                    continue
                metric.update(predictions, labels, batch["is_answer"] & (tensors[metric.key] == metric.value))
            elif isinstance(metric, AnswerAccuracy):
                if "is_answer" not in batch:
                    continue
                metric.update(predictions, labels, batch["is_answer"])
            else:
                metric.update(predictions, labels)
            yield name, metric

    def _metrics(self) -> Iterator[Metric]:
        for metric in self.values():
            assert isinstance(metric, Metric)
            yield metric
