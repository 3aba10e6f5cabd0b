"""Small models that are trained for 20 steps on sequences cut into parts, by several processes or by one."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dma_kernels.context import ContextGroup
from dma_lightning import DogeForCausalLM, ModelConfig
from dma_lightning.losses import token_losses

STEPS, VOCABULARY, BATCH = 20, 24, 2
DRIFT = {"drift": "gate", "score_form": "linear"}
RETENTION = {"retention_weight": 0.5, "keep_window_size": 8, "keep_last": 1, "sinks": 2}


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        name: name of its test.
        parts: P, the number of parts of a sequence.
        length: N, the sequence length.
        options: options of the model.
        packed: whether the batches have documents and padding.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    name: str
    parts: int = 4
    length: int = 40
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = True
    checkpointing: bool = False


RUNS = [
    Run("dma", length=38),
    Run("plain", 2, packed=False),
    Run("kept", 2, options={"keep_last": 3, "sinks": 2, "keep_window_size": 3}),
    Run("linear", 2, options={"score_form": "linear", "wide_layers": [1], "wide_keep_window_size": 12}),
    Run("constant", 2, options={"drift": "constant", "score_form": "linear"}, packed=False),
    Run("gate", 4, 37, options=DRIFT | {"keep_last": 2, "content": "input"}, checkpointing=True),
    Run("memories", 2, options={"drift": "gate", "memory_heads": 1, "memory_stripes": 3, "content_in_bias": False}),
    Run("far", 2, options=DRIFT | {"keep_last": 3, "content_in_bias": "far"}),
    Run("retention", 4, options=RETENTION),
    Run("output", 2, options=RETENTION | DRIFT | {"retention_target": "output", "content": "input"}),
    Run("swa", 4, 38, options={"attention": "swa", "sliding_window": 7}),
    Run("swa-drift", 2, options={"attention": "swa", "sliding_window": 24, "drift": "gate"}),
    Run("reference", 2, options={"backend": "reference"}),
]


def batch(run: Run, step: int) -> dict[str, Tensor | None]:
    """Tokens, labels, documents and padding of a step, for whole sequences."""
    torch.manual_seed(step)
    shape = BATCH, run.length
    tokens, labels = torch.randint(VOCABULARY, (2, *shape))
    documents = padding = None
    if run.packed:
        documents = (torch.rand(shape) < 0.07).long().cumsum(-1) % 3
        padding = torch.rand(shape) < 0.1
        labels[padding] = -100
    return {"input_ids": tokens, "labels": labels, "documents": documents, "padding": padding}


def model_of(run: Run) -> DogeForCausalLM:
    """A model whose ranks differ from the start of training."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "keep_window_size": 5}
    model = DogeForCausalLM(ModelConfig(**sizes | others | run.options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.activation_checkpointing = run.checkpointing
    return model


def part_of(whole: dict[str, Tensor | None], group: ContextGroup) -> dict[str, Tensor | None]:
    """A part of a batch. Positions after the end are padding."""
    fill = {"labels": -100, "padding": True}
    length = whole["input_ids"].shape[1]
    if whole["padding"] is None and length % group.size:
        whole["padding"] = torch.zeros(BATCH, length, dtype=torch.bool)
    return {name: None if x is None else group.part(x, fill=fill.get(name, 0)) for name, x in whole.items()}


def train(run: Run, group: ContextGroup | None = None, processes: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The logits of the first step, and the weights after all steps. With a group, the logits are those of a part."""
    model = model_of(run)
    model.join_context(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for step in range(STEPS):
        found = batch(run, step)
        labeled = (found["labels"] >= 0).sum()
        if group is not None:
            found = part_of(found, group)
        labels = found.pop("labels")
        for mixer in model.mixers:
            mixer.begin_step(step)
        logits = model(**found)
        first = logits.detach() if first is None else first
        (token_losses(logits, labels).sum() / labeled).backward()
        if group is not None:
            gradients = [parameter.grad for parameter in model.parameters()]
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together, group=processes)
            for gradient, total in zip(gradients, together.split([x.numel() for x in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))
        optimizer.step()
        optimizer.zero_grad()
    return [first, *(parameter.detach() for parameter in model.parameters())]
