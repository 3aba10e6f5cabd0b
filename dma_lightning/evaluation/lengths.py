"""How well a model does at lengths other than the training length.

B batch, N length.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dma_lightning.data.samplers import Sequences
from dma_lightning.evaluation.costs import Cost
from dma_lightning.evaluation.reading import Reader
from dma_lightning.evaluation.scores import Scores


@dataclass(frozen=True)
class LengthScores:
    """Results for sequences of one length.

    Attributes:
        length: N.
        sequences: number of sequences read.
        labels: number of tokens to predict.
        loss: mean over labels, in nats.
        accuracy: share of labels that are the likeliest token.
        answers: share of whole answers that are right; None if labels are not answers.
        bits_per_byte: loss in bits per byte of the text that labels stand for; None if they stand for none.
        cost: cost of reading a sequence and continuing it.
    """

    length: int
    sequences: int
    labels: int
    loss: float
    accuracy: float
    answers: float | None
    bits_per_byte: float | None
    cost: Cost

    def figures(self) -> dict[str, Any]:
        """All values as one dictionary, for a file."""
        return {name: x for name, x in asdict(self).items() if name != "cost"} | asdict(self.cost)


def length_scores(reader: Reader, sequences: Sequences, examples: int, batch_size: int) -> LengthScores:
    """Score the first sequences of a data set, all of one length.

    Args:
        reader: reads the sequences.
        sequences: the data set.
        examples: maximum number of sequences to read.
        batch_size: number of sequences to read at once.
    """
    count = min(examples, len(sequences))
    parts, answers, cost, size = [], [], None, 0
    length = 0
    with reader.inferring():
        for start in range(0, count, batch_size):
            items = [sequences[i] for i in range(start, min(start + batch_size, count))]
            batch = {name: x.to(reader.device) for name, x in default_collate(items).items()}
            parts.append(sequence_scores(reader, batch))
            size += int(batch["label_bytes"].sum()) if "label_bytes" in batch else 0
            if "is_answer" in batch:
                answers.append(parts[-1][batch["is_answer"].cpu()])
            if cost is None:
                length, cost = batch["input_ids"].shape[1], Cost.measured(reader, batch["input_ids"])
    assert cost is not None  # set with the first batch
    scores = Scores.joined(parts)
    right = Scores.joined(answers).answers if answers else None
    bits = scores.nats.sum().item() / size / math.log(2) if size else None
    labels = int(scores.labels.sum())
    return LengthScores(length, count, labels, scores.loss, scores.accuracy, right, bits, cost)


def sequence_scores(reader: Reader, batch: dict[str, Tensor]) -> Scores:
    """Scores of all labels of a batch `[B, N]` on the reader's device, within `inferring`."""
    zeros = [torch.zeros(len(batch["labels"]), dtype=dtype) for dtype in (torch.float64, torch.int64, torch.int64)]
    scores = Scores(*zeros)
    for part, logits in reader.chunks(batch["input_ids"], batch.get("documents"), batch.get("padding")):
        scores += Scores.of(logits, batch["labels"][:, part])
    return scores
