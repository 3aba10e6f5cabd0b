"""The retention loss of a sequence that is divided among processes: each has its own keys and all sampled queries.

The queries are few, so they go to all processes. For every softmax over the keys of the whole sequence, processes send
each other the log-sum-exp over their own keys. So the traffic does not grow with the sequence.

B batch, H query heads, G KV heads, R = H / G group, P processes, n length of a part, M sampled queries, D head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dma_kernels.context import ContextGroup
from dma_kernels.keep_rule import KeepRule
from dma_kernels.lifetime_masks import is_sink
from dma_kernels.packing import Packing
from dma_kernels.precision import without_autocast
from dma_kernels.reference import masked_logsumexp
from dma_lightning.mixers.retention import FLOOR


class LayerPart(NamedTuple):
    """The tensors of a layer for one part; `retention_loss` takes them for a whole sequence.

    Attributes:
        q: queries `[B, H, n, D]`.
        k: keys `[B, G, n, D]`.
        content: `[B, G, n]`; it alone gets a gradient.
        drift: sum of the decays up to each key, including those of earlier parts, float64 `[B, G, n]`; None if keys do
            not decay.
        values: `[B, G, n, D]` if the target is the effect on the output; None if it is the attention.
    """

    q: Tensor
    k: Tensor
    content: Tensor
    drift: Tensor | None
    values: Tensor | None


class _Sampled(NamedTuple):
    """The sampled queries, the same in all processes.

    Attributes:
        position: position in the whole sequence, int64 `[M]`.
        q: `[B, H, M, D]`.
        drift: float64 `[B, G, M]`.
        run: number of the document, int64 `[B, M]`.
        real: bool `[B, M]`, False for padding.
    """

    position: Tensor
    q: Tensor
    drift: Tensor
    run: Tensor
    real: Tensor


def part_retention_loss(
    context: ContextGroup, part: LayerPart, positions: Tensor, keep: KeepRule, packing: Packing | None = None
) -> Tensor:
    """`retention_loss` of the whole sequence, the same number in all processes; all of them call it.

    Its gradient is that of this part's content alone: the sum over processes is the gradient of the loss.

    Args:
        context: the processes.
        part: tensors of this process's part.
        positions: positions of the sampled queries in the whole sequence, which has P n positions, int64 `[M]`.
        keep: the keep rule, as in `retention_loss`.
        packing: the packing of this part, from `ContextGroup.pack`.

    Returns:
        `[]` in float32 (float64 if q is).
    """
    content = part.content.to(torch.promote_types(part.q.dtype, torch.float32))
    packing = packing or Packing()
    with without_autocast(part.q.device):
        sampled = _sample(context, part, positions, packing)
        seen, far = _seen_and_far(context, sampled, part, keep, packing)  # [B, 1, M, n]
        decay = _decay(sampled, part, content)  # [B, G, M, n]
        target = _target(context, sampled, part, decay, seen).where(far, 0)  # [B, G, M, n]
        foreseen = torch.where(far, content[:, :, None] + decay, 0)
        own = torch.stack([(target * foreseen).sum(-1), masked_logsumexp(foreseen, far)])  # [2, B, G, M]
        own_mass, any_far = target.sum(-1), far.any(-1).to(content.dtype).expand(-1, content.shape[1], -1)
        all_own, all_mass, all_far = context.gather([own.detach(), own_mass, any_far])
        hit, log_sums = all_own[:, 0].sum(0) + (own[0] - own[0].detach()), _with_own(context, all_own[:, 1], own[1])
        mass, has_far = all_mass.sum(0), all_far.sum(0) > 0  # [B, G, M]
        missed = mass * torch.where(has_far, torch.where(has_far, log_sums, 0).logsumexp(0), 0)
        queries = has_far.sum((0, 2), dtype=content.dtype)  # [G]
        total = mass.sum((0, 2)) + FLOOR * queries
        return -((hit - missed).sum((0, 2)) / total.where(queries > 0, 1)).mean()


def _with_own(context: ContextGroup, gathered: Tensor, own: Tensor) -> Tensor:
    """`gathered` `[P, ...]`, whose entry for this process is `own`, the only one with a gradient."""
    is_own = torch.arange(context.size, device=own.device) == context.rank
    return torch.where(is_own.view(-1, *[1] * own.ndim), own, gathered)


@torch.no_grad()
def _sample(context: ContextGroup, part: LayerPart, positions: Tensor, packing: Packing) -> _Sampled:
    """The queries at these positions, each from the process whose part contains it."""
    length = part.q.shape[2]
    owner, place = positions // length, positions % length
    batch, drift = len(part.q), part.drift
    run, real = packing.runs, None if packing.padding is None else ~packing.padding
    whole = torch.zeros(batch, length, dtype=torch.int64, device=part.q.device)
    mine = [
        part.q[:, :, place],
        torch.zeros_like(part.content[..., place], dtype=torch.float64) if drift is None else drift[..., place],
        (whole if run is None else run)[:, place],
        (whole == 0 if real is None else real)[:, place],
    ]
    q, drift, run, real = context.gather(mine)  # [P, B, ..., M]
    column = torch.arange(len(positions), device=owner.device)
    q = q.movedim(3, 1)[owner, column].movedim(0, 2)
    drift, run, real = (x.movedim(-1, 1)[owner, column].movedim(0, -1) for x in (drift, run, real))
    return _Sampled(positions, q, drift, run, real)


@torch.no_grad()
def _seen_and_far(
    context: ContextGroup, sampled: _Sampled, part: LayerPart, keep: KeepRule, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Which keys of this part each sampled query may attend to, and which are far; bool `[B, 1, M, n]`."""
    age = sampled.position[:, None] - context.positions(part.k.shape[2], part.k.device)  # [M, n]
    seen = (age >= 0).expand(len(part.k), 1, -1, -1)
    if packing.runs is not None:
        seen = seen & (sampled.run[..., None] == packing.runs[:, None])[:, None]
    if packing.padding is not None:
        seen = seen & ~packing.padding[:, None, None]
    far = seen & (age >= max(keep.last, keep.window // 4)) & sampled.real[:, None, :, None]
    if keep.sinks:
        far = far & ~_sinks_of_part(context, keep.sinks, part.k[:, 0, :, 0], packing)[:, None, None]
    return seen, far


def _sinks_of_part(context: ContextGroup, sinks: int, like: Tensor, packing: Packing) -> Tensor:
    """Which keys of the part are among the first real ones of their documents, bool `[B, n]`, n and B as in `like`."""
    run = torch.zeros_like(like, dtype=torch.int64) if packing.runs is None else packing.runs
    real = torch.ones_like(run, dtype=torch.bool) if packing.padding is None else ~packing.padding
    in_last = (real & (run == run[:, -1:])).sum(-1)
    last_runs, counts = context.gather([run[:, -1], in_last])  # [P, B]
    goes_on = (last_runs == run[:, 0])[: context.rank]
    before = (counts[: context.rank] * goes_on).sum(0)[:, None]  # [B, 1] real keys of the first document
    place = real.long().cumsum(-1) + before
    place_is_sink = is_sink(sinks, torch.arange(run.shape[1], device=run.device)[None, None], packing)[:, 0]
    return torch.where(run == run[:, :1], place <= sinks, place_is_sink)


@torch.no_grad()
def _decay(sampled: _Sampled, part: LayerPart, content: Tensor) -> Tensor:
    """What each key has lost at each sampled query, in nats, `[B, G, M or 1, n]`."""
    if part.drift is None:
        return torch.zeros_like(content)[:, :, None]
    return (part.drift[:, :, None] - sampled.drift[..., None]).to(content.dtype)


@torch.no_grad()
def _target(context: ContextGroup, sampled: _Sampled, part: LayerPart, decay: Tensor, seen: Tensor) -> Tensor:
    """The target for the keys of this part that queries see, as a mean over a group's heads, `[B, G, M, n]`.

    NaN for a query that sees no key.
    """
    grouped = sampled.q.to(decay.dtype).unflatten(1, (part.k.shape[1], -1))  # [B, G, R, M, D]
    logits = grouped @ part.k.to(decay.dtype)[:, :, None].mT * sampled.q.shape[-1] ** -0.5 + decay[:, :, None]
    own = masked_logsumexp(logits, seen[:, :, None])  # [B, G, R, M]
    (all_own,) = context.gather([own])
    attention = (logits - all_own.logsumexp(0)[..., None]).exp().where(seen[:, :, None], 0)  # [B, G, R, M, n]
    if part.values is None:
        return attention.mean(2)
    v, shared = part.values.to(decay.dtype), seen.to(decay.dtype)
    sums, counts = context.gather([shared @ v, shared.sum(-1, keepdim=True)])
    mean = sums.sum(0) / counts.sum(0)  # [B, G, M, D]
    square = v.square().sum(-1)[:, :, None] - 2 * mean @ v.mT + mean.square().sum(-1, keepdim=True)
    effect = attention * square.clamp(min=0).sqrt()[:, :, None]
    (totals,) = context.gather([effect.sum(-1, keepdim=True)])
    total = totals.sum(0)
    return (effect / total.where(total != 0, 1)).mean(2)
