"""Checks before training whether a step can fit into memory.

B batch, N length, C hidden size, I intermediate size, V vocabulary.
"""

from pathlib import Path

import torch

from dma_lightning.model import DogeForCausalLM

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def least_step_bytes(
    model: DogeForCausalLM,
    batch_size: int,
    length: int,
    number_bytes: int,
    shards: int = 1,
    loss_chunk: int | None = None,
    spared: int = 0,
) -> int:
    """A lower bound of the memory that a training step takes in addition to the weights.

    It counts gradients and two moments of every weight that is trained, in float32. For each layer and token it counts
    what projections and feed-forward network keep for the backward pass: 3 I + 4 C numbers, or C if activations are
    computed again or some weights are frozen. For each token, or those of a chunk, it counts logits and their gradient,
    2 V numbers. It does not count what attention keeps.

    Args:
        model: the decoder.
        batch_size: B, of one process.
        length: N.
        number_bytes: bytes of an activation, 2 for bfloat16.
        shards: how many processes share the weights.
        loss_chunk: tokens whose logits are in memory at once; None for all.
        spared: number of weights for which the optimizer keeps only one moment, as Muon does.
    """
    config = model.config
    kept, trained = config.hidden_size, sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not model.activation_checkpointing and trained == model.num_parameters:
        kept = 3 * config.intermediate_size + 4 * config.hidden_size
    tokens = batch_size * length
    logits = 2 * config.vocab_size * (tokens if loss_chunk is None else min(tokens, loss_chunk))
    optimized = (12 * trained - 4 * spared) // shards
    return optimized + (tokens * config.num_hidden_layers * kept + logits) * number_bytes


def available_bytes(device: torch.device) -> int | None:
    """Memory of a device that is free or can be freed; None if the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    found = [1024 * int(lines["MemAvailable"].split()[0])] if "MemAvailable" in lines else []
    limits = [path.read_text().strip() for path in _CGROUP_LIMITS if path.exists()]  # for containers
    return min(found + [int(limit) for limit in limits if limit.isdecimal()], default=None)


def too_large(needed: int, device: torch.device, batch_size: int, length: int) -> str | None:
    """A warning if a device has less memory than `needed` bytes; None if it has enough, or if that is unknown."""
    available = available_bytes(device)
    if available is None or needed <= available:
        return None
    return (
        f"a step takes at least {needed / 1e9:,.1f} GB besides the weights (batch_size {batch_size} x sequence_length "
        f"{length:,}), and {device.type} has {available / 1e9:,.1f} GB left: it will be killed or run out of "
        "memory; lower data.batch_size (and raise trainer.accumulate_grad_batches) or data.sequence_length, set "
        "model.activation_checkpointing to true, or set model.loss_chunk"
    )
