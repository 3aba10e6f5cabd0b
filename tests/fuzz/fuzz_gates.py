"""Attention with a drift, including how its gates and contents are computed, against NumPy in float64.

B batch, H query heads, G KV heads, N length, D head dim, C hidden size.
"""

import random
from dataclasses import dataclass

import drifting
import numpy as np
import torch
from fuzz_backends import AttentionCase
from fuzz_draws import Packing, generator
from fuzz_oracles import attention
from fuzz_told import told
from torch import Tensor

from dma_kernels import KeepRule
from dma_kernels import Packing as PackedBatch
from dma_lightning.backends import attend
from dma_lightning.mixers.drift import Drift
from dma_lightning.mixers.drifting_ranks import DriftingRanks

_LARGEST = 8.0  # nats, the largest step and the largest content


@dataclass(frozen=True)
class GateCase:
    """Inputs of attention, and gates and contents computed from an input `[B, N, C]`, all in float64."""

    attention: AttentionCase
    drifting: DriftingRanks
    x: Tensor

    @classmethod
    def drawn(cls, rng: random.Random) -> "GateCase":
        case = AttentionCase.drawn(rng, torch.float64, longest=70)
        batch, kv_heads, length, _ = case.inputs[1].shape
        hidden, source = rng.randint(1, 5), generator(rng)
        memories = rng.choice((0, 0, 0, rng.randint(0, kv_heads)))
        module = DriftingRanks(
            Drift("gate", hidden, kv_heads, 16, (1.0, 2.0)),
            hidden,
            content=rng.choice(("input", "input", "values")),
            content_in_bias=rng.random() < 0.5,
            memory_heads=memories if memories != kv_heads else 0,
        ).double()
        with torch.no_grad():
            module.drift.rate.fill_(rng.choice((-30.0, -5.0, -2.0, 1.0, 12.0)))
            for weight in (module.drift.weight, module.weight):
                if weight is not None:
                    drawn = torch.randn(weight.shape, generator=source, dtype=torch.float64)
                    weight.copy_(drawn * rng.choice((0.0, 0.5, 4.0)))
        x = torch.randn(batch, length, hidden, generator=source, dtype=torch.float64)
        return cls(case, module, x)

    @property
    def packing(self) -> Packing:
        return self.attention.packing

    @property
    def published(self) -> Tensor:
        """Ranks without a drift `[B, G, N]`. They are finite, since heads with a drift may add them to biases."""
        return self.attention.ranks.nan_to_num(0.0, 5.0, -5.0).clamp(-1e3, 1e3)

    def __str__(self) -> str:
        made = self.drifting
        options = f"content {'values' if made.weight is None else 'input'}, in bias {made.content_in_bias}"
        return f"{self.attention}, C {self.x.shape[-1]}, {options}, {made.memory_heads} memories"

    def found(self, backend: str) -> dict[str, Tensor]:
        """Output and gradients by a backend, which also selects the keys."""
        names = ("q", "k", "v", "rank", "key_bias", "x")
        given = (*self.attention.inputs[:3], self.published, self.attention.inputs[3], self.x)
        leaves = {name: x.detach().requires_grad_() for name, x in zip(names, given, strict=True)}
        packing, kept = PackedBatch.of(**self.packing.arguments()), self.attention.kept
        keys = self.drifting(leaves["x"], leaves["rank"], leaves["key_bias"], packing)
        rule = KeepRule(kept.window, kept.keep_last, kept.sinks)
        options = {"scale": self.attention.scale, "query_bias": keys.drifted.query_bias}
        q, k, v = (leaves[name] for name in ("q", "k", "v"))
        out = attend(backend, q, k, v, keys.key_bias, keys.rank, rule, packing, **options)
        trained = leaves | dict(self.drifting.named_parameters())
        gradients = torch.autograd.grad(out, trained.values(), self.attention.grad, materialize_grads=True)
        return {"out": out.detach()} | dict(zip(trained, gradients, strict=True))

    def expected(self) -> dict[str, np.ndarray]:
        """Output and gradients by formulas. Only the selection takes steps from the module, so that ranks are equal."""
        gate = self.drifting.drift
        x, rate, weight = (y.detach().numpy() for y in (self.x, gate.rate, gate.weight))
        drifts, padded = gate.drifts.numpy()[:, None], self._padded()
        before = np.einsum("bnc,gc->bgn", x, weight) + rate[:, None]
        counted = drifts & ~padded
        steps = np.where(counted, np.minimum(np.logaddexp(0, before), _LARGEST), 0)
        slope = np.where(counted & (np.logaddexp(0, before) < _LARGEST), 1 / (1 + np.exp(-before)), 0)
        content, d_content = self.published.numpy(), 1.0  # and its derivative
        if self.drifting.weight is not None:
            raw = np.einsum("bnc,gc->bgn", x, self.drifting.weight.detach().numpy()) / _LARGEST
            content, d_content = _LARGEST * np.tanh(raw), 1 - np.tanh(raw) ** 2
        counts = float(self.drifting.content_in_bias)
        drift = np.rint(steps * 2**32).cumsum(-1) / 2**32  # in whole units
        scores = np.where(drifts, content * counts + drift, self.attention.inputs[3].numpy())

        q, k, v = (y.numpy() for y in self.attention.inputs[:3])
        scale = q.shape[-1] ** -0.5 if self.attention.scale is None else self.attention.scale
        out, dq, dk, dv, d_scores = attention(q, k, v, scores, self._mask(), scale, self.attention.grad.numpy())
        drifted = np.where(drifts, d_scores, 0)
        before_gate = drifted[..., ::-1].cumsum(-1)[..., ::-1] * slope  # a step moves its own key and all later ones
        before_content = drifted * counts * d_content
        found = {"out": out, "q": dq, "k": dk, "v": dv, "key_bias": np.where(drifts, 0, d_scores)}
        found |= {"drift.rate": before_gate.sum((0, 2)), "drift.weight": np.einsum("bgn,bnc->gc", before_gate, x)}
        found["x"] = np.einsum("bgn,gc->bnc", before_gate, weight)
        if self.drifting.weight is None:
            return found | {"rank": before_content}
        found["x"] = found["x"] + np.einsum("bgn,gc->bnc", before_content, self.drifting.weight.detach().numpy())
        found["weight"] = np.einsum("bgn,bnc->gc", before_content, x)
        return found | {"rank": np.zeros_like(scores)}

    def _padded(self) -> np.ndarray:
        if self.packing.padding is None:
            return np.zeros((len(self.x), 1, self.x.shape[1]), dtype=bool)
        return self.packing.padding[:, None].numpy()

    @torch.no_grad()
    def _mask(self) -> np.ndarray:
        """Bool `[B, G, N, N]`, from ranks as Python's integers."""
        steps, content = self.drifting.drift(self.x), self.drifting.content(self.x, self.published)
        masks = []
        for b in range(len(self.x)):
            row = self.packing.row(b)
            for g, drifts in enumerate(self.drifting.drift.drifts.tolist()):
                ranks = self.published[b, g].tolist()
                if drifts:
                    ranks = drifting.integer_ranks(content[b, g].tolist(), steps[b, g].tolist(), row[1])
                masks.append(self.attention.kept.mask(ranks, *row))
        return np.array(masks).reshape(len(self.x), -1, *masks[0].shape)


def check_gates(seed: int) -> None:
    """`reference` and `torch` in float64: outputs and all gradients, with those of gates, contents and layer input."""
    rng = random.Random(seed)
    case = GateCase.drawn(rng)
    with told(seed, case):
        expected = case.expected()
        for backend in ("reference", "torch"):
            found = case.found(backend)
            assert found.keys() == expected.keys(), f"{found.keys()}"
            for name, y in expected.items():
                error, allowed = np.abs(found[name].numpy() - y).max(), 1e-10 * (1 + np.abs(y).max())
                assert error <= allowed, f"{backend}, {name}: off by {error}, more than {allowed}"
