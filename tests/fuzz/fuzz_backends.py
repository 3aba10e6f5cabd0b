"""Backends against softmax in NumPy's float64: outputs and all gradients.

B batch, H query heads, G KV heads, N length, D head dim.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from fuzz_draws import DEVICE, Packing, draw_length, draw_ranks, draw_window, generator
from fuzz_oracles import Kept, attention
from fuzz_told import told
from torch import Tensor

from dma_flex import flex_segment_attention
from dma_kernels import Lifetimes, fused_attention, reference_attention, segment_attention

_NAMES = ("out", "dq", "dk", "dv", "dscores")
Attention = Callable[..., Tensor]  # of q, k, v, scores, lifetimes


@dataclass(frozen=True)
class AttentionCase:
    """Tensors of one dtype, and a mask that is drawn independently of them."""

    inputs: list[Tensor]
    grad: Tensor
    kept: Kept
    ranks: Tensor
    packing: Packing
    scale: float | None
    drift: Tensor | None = None  # float64 [B, G, N], added to biases of keys and subtracted from those of queries

    @classmethod
    def drawn(
        cls, rng: random.Random, dtype: torch.dtype, longest: int = 100, head_dim: int | None = None
    ) -> "AttentionCase":
        batch, kv_heads, group = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 3)
        length, head_dim = draw_length(rng, longest), head_dim or rng.choice((1, 2, 3, 8, 16, 17))
        source, size = generator(rng), rng.choice((0.1, 1, 5))

        def draw(heads: int, factor: float = 1.0) -> Tensor:
            x = torch.randn(batch, length, heads, head_dim, generator=source, dtype=torch.float64) * factor
            x = x.to(dtype).transpose(1, 2)
            return x if rng.random() < 0.5 else x.contiguous()

        q, k, v, grad = draw(kv_heads * group, size), draw(kv_heads), draw(kv_heads), draw(kv_heads * group)
        scores = torch.randn(batch, kv_heads, length, generator=source, dtype=torch.float64) * rng.choice((0, 1, 10))
        inputs = [q, k, v, scores.to(torch.promote_types(dtype, torch.float32))]
        kept = Kept(draw_window(rng, length), rng.choice((0, 0, 3)), rng.choice((0, 0, 2)))
        ranks = draw_ranks(rng, (batch, kv_heads, length))
        scale = rng.choice((None, None, 0.7))
        return cls(inputs, grad, kept, ranks, Packing.drawn(rng, batch, length), scale)

    def perhaps_drifting(self, rng: random.Random) -> "AttentionCase":
        """The same case, or one with a drift, which may already have added up to thousands or millions of nats."""
        if rng.random() < 0.6:
            return self
        steps = torch.rand(self.inputs[3].shape, generator=generator(rng), dtype=torch.float64)
        return replace(self, drift=rng.choice((0, 1e3, 7e6)) + rng.choice((0.01, 1)) * steps.cumsum(-1))

    def mask(self) -> np.ndarray:
        """Bool `[B, G, N, N]`."""
        return np.array(
            [[self.kept.mask(x.tolist(), *self.packing.row(b)) for x in row] for b, row in enumerate(self.ranks)]
        )

    def lifetimes(self, device: torch.device | None = None) -> Lifetimes:
        """The mask as lifetimes, by default on the CPU."""
        kept = self.kept
        options = {"keep_last": kept.keep_last, "sinks": kept.sinks, **self.packing.arguments(device)}
        return Lifetimes.top_w(self.ranks.to(device), kept.window, **options)

    def expected(self) -> list[np.ndarray]:
        """Output and gradients, by the definition."""
        q, k, v, scores, grad = (x.double().numpy() for x in (*self.inputs, self.grad))
        scores = scores if self.drift is None else scores + (self.drift - self.drift.min()).numpy()
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return attention(q, k, v, scores, self.mask(), scale, grad)

    def found(
        self, function: Attention, mask: Lifetimes | Tensor, trained: bool = True, **options: object
    ) -> list[Tensor]:
        """Output and gradients by a backend, on the device of the mask."""
        device = mask.death.device if isinstance(mask, Lifetimes) else mask.device
        inputs = [x.to(device) for x in self.inputs]
        if self.drift is not None:
            drift = self.drift.to(device)
            inputs[3], options["query_bias"] = inputs[3] + drift, -drift
        inputs = [x.detach().requires_grad_(trained) for x in inputs]
        out = function(*inputs, mask, self.scale, **options)
        return [out, *torch.autograd.grad(out, inputs, self.grad.to(device))] if trained else [out]

    def __str__(self) -> str:
        q, k = self.inputs[0], self.inputs[1]
        drift = "none" if self.drift is None else f"{self.drift.min().item():g} to {self.drift.max().item():g}"
        sizes = f"q {list(q.shape)} {q.dtype}, {k.shape[1]} KV heads, scale {self.scale}, drift {drift}"
        return f"{sizes}, {self.kept}, {self.packing}"


def check_backends(seed: int) -> None:
    """`reference` and `torch`, mostly in float64, where only the last digits may differ."""
    rng = random.Random(seed)
    dtype = rng.choice((torch.float64, torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16))
    case = AttentionCase.drawn(rng, dtype).perhaps_drifting(rng)
    with told(seed, case):
        expected = case.expected()
        dense = torch.from_numpy(case.mask())
        assert_close(case, case.found(reference_attention, dense), expected)
        options = {"segment_length": rng.choice((None, 1, 16, 33))}
        assert_close(case, case.found(segment_attention, case.lifetimes(), **options), expected)


def check_triton(seed: int) -> None:
    """`triton`; on a CPU through its interpreter, which has no bfloat16."""
    rng = random.Random(seed)
    case = AttentionCase.drawn(rng, rng.choice((torch.float32, torch.float32, torch.float16)), longest=150)
    case = case.perhaps_drifting(rng)
    with told(seed, case):
        options = {"segment_length": rng.choice((None, 128))}
        assert_close(
            case, case.found(fused_attention, case.lifetimes(DEVICE), **options), case.expected(), case.inputs[0].dtype
        )


def check_flex(seed: int) -> None:
    """`flex`, which has no gradients on a CPU. Only a few lengths, since each one is compiled."""
    rng = random.Random(seed)
    case = AttentionCase.drawn(rng, torch.float32, head_dim=16).perhaps_drifting(rng)
    with told(seed, case), torch._dynamo.config.patch(recompile_limit=1000):
        assert_close(case, case.found(flex_segment_attention, case.lifetimes(), trained=False), case.expected())


def assert_close(
    case: AttentionCase, found: list[Tensor], expected: list[np.ndarray], inner: torch.dtype | None = None
) -> None:
    """Allow a few roundings of the largest number in each tensor, and of the terms that are summed to compute it.

    Args:
        case: the inputs.
        found: output, and perhaps gradients.
        expected: exact output and gradients.
        inner: dtype of the terms; by default at least float32.
    """
    q, k, v, scores, grad = (x.double().abs().amax().item() for x in (*case.inputs, case.grad))
    head_dim = case.inputs[0].shape[-1]
    if case.drift is not None:  # a float64 bias contains all of it, a float32 one only what differs between keys
        scores += (case.drift.max() - (0 if case.grad.dtype == torch.float64 else case.drift.min())).item()
    logits, inner = q * k * head_dim + scores, inner or torch.promote_types(case.inputs[0].dtype, torch.float32)
    for name, x, y in zip(_NAMES, found, expected, strict=False):
        largest = np.abs(y).max()
        terms = 20 * torch.finfo(inner).eps * (1 + logits) * max(largest, v * grad * head_dim)
        error = np.abs(x.detach().double().cpu().numpy() - y).max()
        allowed = 2 * torch.finfo(x.dtype).eps * largest + terms
        assert error <= allowed, f"{name}: off by {error}, more than {allowed}"
