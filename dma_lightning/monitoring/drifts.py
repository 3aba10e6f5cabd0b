"""What drifts have learned: how fast keys fall behind, after how many positions, and how far contents can lift them.

B batch, N length, G KV heads, L maximum length of a sequence.
"""

from dataclasses import dataclass, replace

import lightning.pytorch as pl
import torch
from torch import Tensor

from dma_kernels import Packing
from dma_kernels.fixed_point import drift_sums
from dma_kernels.packing import document_ends
from dma_kernels.units import FRACTION_BITS
from dma_lightning.data.base import Batch
from dma_lightning.mixers import DynamicMaskAttention, TokenMixer
from dma_lightning.mixers.drift import Drift
from dma_lightning.model import DogeForCausalLM, decoder_of
from dma_lightning.monitoring.recording import FirstBatchMonitor, look_at_layers

_PERCENTS = (10, 50, 90)


@dataclass(frozen=True)
class DriftSums:
    """What the drift of a layer does, as sums that add up over sequences and processes.

    Attributes:
        heads: the number of real positions of each head, and the sums over them of the steps and, if the layer has
            contents, of contents and of squared contents; float64 `[2 or 4, G]`, 0 for heads without a drift.
        ages: number of e-folds of each length from 0 to L, float64 `[L + 1]`.
        window: number of positions over which the drift is measured.
    """

    heads: Tensor
    ages: Tensor
    window: int

    @classmethod
    def of(
        cls,
        drift: Drift,
        steps: Tensor,
        longest: int,
        packing: Packing | None = None,
        content: Tensor | None = None,
    ) -> "DriftSums":
        """The sums over sequences, in O(B G N log N).

        Args:
            drift: says which heads have a drift.
            steps: the drift's step at each position and head, `[B, G, N]`; 0 at padding.
            longest: L, at least N.
            packing: documents and padding.
            content: the ranks without their drift, `[B, G, N]`, if the layer has ranks.
        """
        padding = None if packing is None else packing.padding
        real = torch.ones_like(steps[:, 0], dtype=torch.bool) if padding is None else ~padding  # [B, N]
        counted = (real[:, None] & drift.drifts[:, None]).double()  # [B, G, N]
        wide = [counted, steps.double()]
        if content is not None:
            wide += [content.double(), content.double().square()]
        heads = torch.stack([x.where(counted > 0, 0).sum((0, 2)) for x in wide])
        ages, late = efolds(steps[:, drift.drifts], packing)
        counts = ages[late[:, None].expand_as(ages)].bincount(minlength=longest + 1)
        return cls(heads, counts.double(), drift.window)

    def figures(self) -> dict[str, Tensor]:
        """The figures by name, each a scalar; none if there are no real positions.

        `per_window`, `per_window_min`, `per_window_max`: mean step times the window, in nats: the mean over heads, the
        smallest and the largest head.
        `efold_10`, `efold_50`, `efold_90`: quantiles of e-folds over queries and heads, in positions: the smallest
        number that at least this many percent do not exceed.
        `spread`: standard deviation of the content in units of `per_window`, mean over heads.
        """
        positions, steps, *content = self.heads[:, self.heads[0] > 0]
        if not len(positions):
            return {}
        nats = self.window * steps / positions
        found = {"per_window": nats.mean(), "per_window_min": nats.min(), "per_window_max": nats.max()}
        reached = 100 * self.ages.cumsum(0)
        for percent in _PERCENTS:
            age = (reached < percent * self.ages.sum()).sum().to(nats.dtype)
            found[f"efold_{percent}"] = age.where(nats.isfinite().all(), torch.nan)
        if content:
            mean, square = (x / positions for x in content)
            found["spread"] = ((square - mean.square()).clamp(min=0).sqrt() / nats).mean()
        return found


def efolds(steps: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    """The distance from each query back to the nearest key of its document that has fallen a nat behind.

    That is the smallest a > 0 with `d_{t-a+1} + ... + d_t >= 1`, where t - a is a real position of the document of t. A
    query without such a key gets N.

    Args:
        steps: d, at least 0, `[B, G, N]`, and 0 at padding.
        packing: documents and padding.

    Returns:
        a, int64 `[B, G, N]`, and a mask of real queries in the later half of the real positions of their document,
        bool `[B, N]`. These queries can see every e-fold of up to half a document.
    """
    (batch, _, length), place = steps.shape, torch.arange(steps.shape[-1], device=steps.device)
    packing = packing or Packing()
    runs = place.new_zeros(batch, length) if packing.runs is None else packing.runs
    start, end = torch.searchsorted(runs, runs), document_ends(runs)[:, 0].long()  # [B, N]
    real = torch.ones_like(runs, dtype=torch.bool) if packing.padding is None else ~packing.padding
    drifted = drift_sums(steps)
    nat = 1 << FRACTION_BITS
    key = torch.searchsorted(drifted, drifted - nat, right=True) - 1  # the last one with D_j <= D_t - 1, or -1
    last = place.masked_fill(~real, -1).cummax(-1).values[:, None].expand_as(key)  # padding repeats the D before it
    key = last.gather(-1, key.clamp(min=0)).where(key >= 0, -1)
    age = (place - key).clamp(min=1).where(key >= start[:, None], length)
    seen = real.long().cumsum(-1)
    before = (seen - real.long()).gather(-1, start)  # real positions before the document
    return age, real & (2 * (seen - before) > seen.gather(-1, end - 1) - before)


class DriftMonitor(FirstBatchMonitor):
    """Logs, at validations, what the drifts of a model have learned, layer by layer.

    The figures come from one extra forward pass over the first sequences of the first validation batch of each process.
    Heads without a drift are left out; a model without drifts logs nothing.

    Args:
        sequences: how many sequences of the batch to use.

    Raises:
        ValueError: if the number is below 1.
    """

    def layers(self, model: DogeForCausalLM) -> dict[int, TokenMixer]:
        found = {i: (mixer, drift_of(mixer)) for i, mixer in enumerate(model.mixers)}
        return {i: mixer for i, (mixer, drift) in found.items() if drift is not None and drift.drifts.any()}

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch) -> None:
        model = decoder_of(pl_module)
        longest = model.config.max_position_embeddings  # the same in all processes

        def sums(mixer: TokenMixer, x: Tensor, packing: Packing | None) -> DriftSums:
            drift = drift_of(mixer)
            assert drift is not None
            steps = drift(x, None if packing is None else packing.padding)
            content = mixer.content(x) if isinstance(mixer, DynamicMaskAttention) else None
            return DriftSums.of(drift, steps, longest, packing, content)

        seen = look_at_layers(trainer, model, self.layers(model), batch, sums)
        heads, ages = (
            trainer.strategy.reduce(torch.stack(x), reduce_op="sum")
            for x in zip(*((x.heads, x.ages) for x in seen.values()), strict=True)
        )
        for (i, own), *total in zip(seen.items(), heads, ages, strict=True):
            figures = replace(own, heads=total[0], ages=total[1]).figures()
            tags = {f"drift/layer_{i}/{name}": x for name, x in figures.items()}
            pl_module.log_dict(tags, sync_dist=True)  # all processes have the same figures; this avoids a warning


def drift_of(mixer: TokenMixer) -> Drift | None:
    """The drift of a mixer, or None if it has none."""
    return next((part for part in mixer.modules() if isinstance(part, Drift)), None)
