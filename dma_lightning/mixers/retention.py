"""The retention loss: it trains the content of a key's rank to predict how much later queries attend to the key.

In each step, a few queries are sampled. The target of each query is its attention to keys far behind it. The
prediction is a softmax of content plus drift over these keys. Suppose that queries attend to a key at a rate of
exp(rank), with a decay that all keys share. Then the cross entropy of target and prediction is the negative logarithm
of Cox's partial likelihood, and keeping the best-ranked keys keeps most of the attention.

A mixer calls `retention_loss` in its forward pass. Here, `x` is a tensor that the mixer's result depends on, such as
its output:

    if self.training and torch.is_grad_enabled() and cache is None:
        positions = self.retention_queries.at(self.step, N, x.device)
        loss = retention_loss(q, k, content, drift, positions, self.keep, packing)
        x = with_auxiliary_loss(x, loss, weight)      # of dma_lightning.auxiliary_losses

- `q` and `k` are the inputs of attention, after norm and rotary embedding. Content must be float32 and drift float64,
  even under autocast.
- `self.step` is the number of the optimizer step, in an int64 buffer `[]` that is not saved. With a Python number,
  layers would be compiled again for each step. The step must not change between the forward and the backward pass
  of a layer, since the backward pass may compute the layer again.
- `weight` is the weight of the whole loss, divided by the number of layers, so that the mean over layers is trained.
- The loss is computed even if no key is far, since DDP waits for every gradient. It is then 0, with zero gradients.
- The mixer names the parameters of content in `auxiliary_parameters`, so that they are clipped separately.

B batch, H query heads, G KV heads, R = H / G group, N length, M sampled queries, D head dim.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dma_kernels.attention.ops import check_kernels_can
from dma_kernels.checks import check_attention_inputs
from dma_kernels.keep_rule import KeepRule, check_at_least
from dma_kernels.lifetime_masks import is_sink
from dma_kernels.packing import Packing
from dma_kernels.precision import without_autocast
from dma_kernels.retention.inputs import NO_RUN, TermInputs
from dma_kernels.retention.terms import Terms, retention_terms, retention_terms_reference

RetentionTarget = Literal["attention", "output"]

FLOOR = 0.01  # mass that is added for each query, so that heads with little attention to far keys do not fit noise
_FRACTION_BITS = 24  # of u: integers, so that all devices draw the same positions
_GOLDEN, _SEED_FACTOR = 0x9E3779B1, 0x85EBCA6B  # 2^32 over the golden ratio, and an unrelated odd number


@dataclass(frozen=True)
class RetentionQueries:
    """Which queries are sampled in a step: positions from `window` on are cut into equal parts, with one query in each.

    Attributes:
        window: w, first position that may be sampled.
        count: M, the number of queries; if there are fewer positions, all of them.
        seed: different seeds sample different positions.
    """

    window: int
    count: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("window", self.window, 1)
        check_at_least("count", self.count, 1)

    def at(self, step: int | Tensor, length: int, device: torch.device | str | None = None) -> Tensor:
        """Ascending positions `w + floor((i + u)(N - w) / M)`, i from 0 to M - 1, with one u in [0, 1) per step.

        u moves by the golden ratio from step to step, which covers [0, 1) evenly. All devices and processes get the
        same positions, and no random state changes.

        Args:
            step: number of the optimizer step, below 2^31; an int, or int64 `[]`.
            length: N.
            device: device of the positions. Default: the CPU.

        Returns:
            int64 `[min(M, N - w)]`, without repetition; empty if N <= w.
        """
        beyond = max(length - self.window, 0)
        count = min(self.count, beyond)
        u = (step * _GOLDEN + self.seed * _SEED_FACTOR % 2**32) % 2**32 >> 32 - _FRACTION_BITS
        place = (torch.arange(count, device=device) << _FRACTION_BITS) + u  # (i + u) · 2^24
        return self.window + place * beyond // (max(count, 1) << _FRACTION_BITS)


def check_retention(weight: float, target: str) -> None:
    """Raise `ValueError` for a weight that is negative or not finite, or an unknown target."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"retention_weight: expected at least 0, got {weight}")
    if target not in get_args(RetentionTarget):
        raise ValueError(f"retention_target: expected one of {list(get_args(RetentionTarget))}, got {target!r}")


def retention_loss(
    q: Tensor,
    k: Tensor,
    content: Tensor,
    drift: Tensor | None,
    positions: Tensor,
    keep: KeepRule,
    packing: Packing | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Cross entropy between the attention of sampled queries to far keys and its prediction from content and drift.

    A key is far from a query if it is at least `keep.last` and at least a quarter of `keep.window` positions behind it,
    lies in the same document, is real, and is not a sink. The target is the query's attention to these keys, averaged
    over the heads of a group. The softmax of this attention is over all real keys of the document up to the query, with
    the drift but without content: otherwise, content would feed itself and grow without limit. The prediction is a
    softmax over the far keys alone, of content plus drift. The loss of a group is

        - sum_t sum_far target · log softmax_far(content + drift)  /  (sum_t sum_far target + 0.01 · queries)

    with sums over all rows of the batch. Only queries that are real and have far keys count. If there are none, the
    loss is 0. The computation needs memory for `[B, H, M, N]`; `fused_retention_loss` does not.

    Args:
        q: queries `[B, H, N, D]`, as attention takes them.
        k: keys `[B, G, N, D]`, H a multiple of G.
        content: each key's rank without its drift, in nats, `[B, G, N]`, float32 (float64 if q is). Only it gets a
            gradient.
        drift: sum of the decays up to each key, in nats, `[B, G, N]`, float32 or float64. Differences are taken before
            rounding. If it is None, keys do not decay.
        positions: positions of the sampled queries, int64 `[M]`; see `RetentionQueries`.
        keep: the keep rule. It determines which keys are sinks, and the distance from which keys are far.
        packing: documents and padding.
        values: `[B, G, N, D]`. If given, the target is not the attention a_j but `a_j |v_j - m|`, divided by its sum
            over all keys that the query may attend to; m is the mean value of these keys. So a key counts little if its
            value is close to the mean, even if it gets much attention, as an attention sink may.

    Returns:
        The mean over groups, `[]` in float32 (float64 if q is).

    Raises:
        ValueError: if shapes, dtypes or devices do not match.
    """
    inputs = _of_terms(q, k, content, drift, positions, keep, packing, values)
    with without_autocast(q.device):
        return _loss(retention_terms_reference(inputs))


def fused_retention_loss(
    q: Tensor,
    k: Tensor,
    content: Tensor,
    drift: Tensor | None,
    positions: Tensor,
    keep: KeepRule,
    packing: Packing | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """`retention_loss` by Triton kernels, in memory that is linear in N.

    The arguments are the same, but only in float32, bfloat16 or float16, and with head dims up to 256.

    Raises:
        ValueError: if the arguments do not match, or the kernels cannot compute with them.
    """
    inputs = _of_terms(q, k, content, drift, positions, keep, packing, values)
    check_kernels_can(q.dtype, q.shape[-1])
    with without_autocast(q.device):
        return _loss(retention_terms(inputs))


def _of_terms(
    q: Tensor,
    k: Tensor,
    content: Tensor,
    drift: Tensor | None,
    positions: Tensor,
    keep: KeepRule,
    packing: Packing | None,
    values: Tensor | None,
) -> TermInputs:
    """The inputs of `retention_terms`."""
    check_attention_inputs(q, k, k, content)
    if drift is not None and (drift.shape != content.shape or drift.device != content.device):
        raise ValueError(
            f"drift: expected {list(content.shape)} on {content.device} as content, got {list(drift.shape)} on "
            f"{drift.device}"
        )
    if values is not None and (values.shape[:-1] != content.shape or values.device != content.device):
        raise ValueError(
            f"values: expected {list(content.shape)} on {content.device} as content, plus a last dimension, got "
            f"{list(values.shape)} on {values.device}"
        )
    if positions.ndim != 1 or positions.dtype != torch.int64 or positions.device != q.device:
        raise ValueError(
            f"positions: expected int64 [M] on {q.device} as q, got {positions.dtype} {list(positions.shape)} on "
            f"{positions.device}; see RetentionQueries"
        )
    packing, content = packing or Packing(), content.to(torch.promote_types(q.dtype, torch.float32))
    packing.check_fits(len(q), content)
    runs, distance = _runs(content, keep.sinks, packing), max(keep.last, keep.window // 4)
    return TermInputs(q[:, :, positions], k, values, content, drift, positions, runs, distance)


@torch.no_grad()
def _runs(content: Tensor, sinks: int, packing: Packing) -> Tensor | None:
    """`runs` of `TermInputs`, int32 `[2, B or 1, N]`; None if each row is one document without padding and sinks.

    Padded queries are in no document, so they have no far keys and do not count.
    """
    if packing.runs is None and packing.padding is None and not sinks:
        return None
    key = torch.arange(content.shape[-1], device=content.device)
    runs = torch.zeros_like(key)[None] if packing.runs is None else packing.runs
    if packing.padding is not None:
        runs = runs.masked_fill(packing.padding, NO_RUN)
    far = runs if not sinks else runs.masked_fill(is_sink(sinks, key[None, None], packing)[:, 0], NO_RUN)
    return torch.stack([runs.expand_as(far), far]).int()


def _loss(terms: Terms) -> Tensor:
    """The mean over groups of the loss, from its terms `[B, G, M]`."""
    queries = terms.has_far.sum((0, 2), dtype=terms.fit.dtype)
    mass = terms.mass.sum((0, 2)) + FLOOR * queries
    return -(terms.fit.sum((0, 2)) / mass.where(queries > 0, 1)).mean()
