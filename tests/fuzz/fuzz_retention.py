"""The retention loss and its gradient with respect to contents, by plain PyTorch and kernels, against float64 NumPy.

B batch, H query heads, G KV heads, N length, D head dim.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from fuzz_draws import DEVICE, Packing, draw_length, draw_window, generator
from fuzz_oracles import Kept, document_starts
from fuzz_told import told
from torch import Tensor

from dma_kernels import KeepRule
from dma_kernels import Packing as PackedBatch
from dma_lightning.mixers.retention import FLOOR, fused_retention_loss, retention_loss

_DECAYS = (0.0, 0.01, 0.3, 8.0)  # the largest step in a case, in nats


@dataclass(frozen=True)
class RetentionCase:
    """Float64 q `[B, H, N, D]`, k, content, drift, and values or None; and positions of the sampled queries."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
    positions: list[int]
    kept: Kept
    packing: Packing

    @classmethod
    def drawn(cls, rng: random.Random, longest: int) -> "RetentionCase":
        batch, kv_heads, length, source = (
            rng.choice((1, 2)),
            rng.randint(1, 2),
            draw_length(rng, longest),
            generator(rng),
        )

        def normal(*shape: int) -> Tensor:  # rounded, so that float16 holds exactly the same numbers
            return torch.randn(shape, generator=source).half().double()

        head_dim = rng.choice((1, 8, 20))
        q = normal(batch, kv_heads * rng.randint(1, 3), length, head_dim) * rng.choice((0, 1, 4))
        k, values = normal(batch, kv_heads, length, head_dim), normal(batch, kv_heads, length, head_dim)
        content = (normal(batch, kv_heads, length) * rng.choice((0, 1, 5))).clamp(-8, 8)
        steps = torch.rand(batch, kv_heads, length, generator=source, dtype=torch.float64)
        drift = (steps * rng.choice(_DECAYS)).cumsum(-1) + rng.choice((0.0, 1e6))
        positions = sorted(rng.sample(range(length), rng.randint(0, min(length, 40))))
        window = draw_window(rng, length)
        last = rng.choice((0, 1, 5)) if window >= 4 else 1  # else a query's own key would be far
        kept = Kept(window, last, rng.choice((0, 0, 2)))
        packing = Packing.drawn(rng, batch, length)
        return cls((q, k, content, drift, rng.choice((None, values))), positions, kept, packing)

    def found(self, loss_of: object, dtype: torch.dtype, content_dtype: torch.dtype) -> tuple[float, np.ndarray]:
        """Loss and gradient by the function `loss_of`."""
        q, k, content, drift, values = (None if x is None else x.to(DEVICE) for x in self.inputs)
        q, k, values = (None if x is None else x.to(dtype) for x in (q, k, values))
        leaf = content.detach().to(content_dtype, copy=True).requires_grad_()
        keep = KeepRule(self.kept.window, self.kept.keep_last, self.kept.sinks)
        positions = torch.tensor(self.positions, dtype=torch.int64, device=DEVICE)
        packing = PackedBatch.of(**self.packing.arguments(DEVICE))
        loss = loss_of(q, k, leaf, drift, positions, keep, packing, values)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.item(), gradient.double().cpu().numpy()

    def expected(self) -> tuple[float, np.ndarray, float]:
        """Loss, gradient, and the size of the terms that cancel in the gradient, by the definition, query by query."""
        content = self.inputs[2].numpy()
        batch, kv_heads, _ = content.shape
        losses, gradient, terms_size = [], np.zeros_like(content), np.zeros_like(content)
        for g in range(kv_heads):
            rows = [(b, *terms) for b in range(batch) for t in self.positions if (terms := self._terms(b, g, t))]
            mass = sum(target.sum() + FLOOR for _, _, target, _ in rows)
            losses.append(-sum((target * log_p).sum() for _, _, target, log_p in rows) / (mass or 1))
            for b, far, target, log_p in rows:
                predicted = target.sum() * np.exp(log_p)
                gradient[b, g, far] -= (target - predicted) / mass / kv_heads
                terms_size[b, g, far] += (target + predicted) / mass / kv_heads
        return float(np.mean(losses)), gradient, float(terms_size.max())

    def _terms(self, b: int, g: int, t: int) -> tuple[list[int], np.ndarray, np.ndarray] | None:
        """Far keys of a query, their targets, and their log-predictions. None if the query does not count."""
        q, k, content, drift, values = (None if x is None else x[b].numpy() for x in self.inputs)
        documents, padding = self.packing.row(b)
        start = document_starts(len(content[g]), documents, padding)[t]
        past = [j for j in range(start, t + 1) if padding is None or not padding[j]]
        distance = max(self.kept.keep_last, self.kept.window // 4)
        far = [i for i, j in enumerate(past) if i >= self.kept.sinks and t - j >= distance]
        if (padding is not None and padding[t]) or not far:
            return None
        decay, target = drift[g][past] - drift[g][t], 0
        group = len(q) // len(k)
        for h in range(g * group, (g + 1) * group):
            share = _softmax(k[g][past] @ q[h, t] / np.sqrt(q.shape[-1]) + decay)
            if values is not None:
                share = share * np.linalg.norm(values[g][past] - values[g][past].mean(0), axis=-1)
                share = share / (share.sum() or 1)
            target = target + share[far] / group
        return [past[i] for i in far], target, np.log(_softmax((content[g][past] + decay)[far]) + 1e-300)

    def __str__(self) -> str:
        shapes = [None if x is None else list(x.shape) for x in self.inputs]
        return f"{shapes}, positions {self.positions}, {self.kept}, {self.packing}"


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def check_retention(seed: int) -> None:
    """The plain form, in float64."""
    case = RetentionCase.drawn(random.Random(seed), longest=100)
    with told(seed, case):
        _compare(case.found(retention_loss, torch.float64, torch.float64), case.expected(), 1e-9)


def check_retention_triton(seed: int) -> None:
    """The kernels, in float32 and float16."""
    rng = random.Random(seed)
    case = RetentionCase.drawn(rng, longest=60 if DEVICE.type == "cpu" else 3000)
    dtype = rng.choice((torch.float32, torch.float16))
    if dtype == torch.float16:
        case = replace(case, inputs=(case.inputs[0].clamp(-100, 100), *case.inputs[1:]))
    with told(seed, f"{dtype}, {case}"):
        _compare(case.found(fused_retention_loss, dtype, torch.float32), case.expected(), 1e-4)


def _compare(found: tuple[float, np.ndarray], expected: tuple[float, np.ndarray, float], tolerance: float) -> None:
    loss, gradient, terms_size = expected
    np.testing.assert_allclose(found[0], loss, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        found[1], gradient, rtol=tolerance, atol=tolerance * (terms_size + 1e-30)
    )  # 1e-30, since float32 underflows near 1e-38
