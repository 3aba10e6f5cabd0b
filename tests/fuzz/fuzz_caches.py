"""Caches: reading a text in arbitrary pieces gives the same as one pass, and keeps all keys that later queries see.

B batch, H query heads, G KV heads, N length, D head dim.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from fuzz_backends import AttentionCase
from fuzz_draws import DEVICE
from fuzz_told import told
from torch import Tensor, nn

from dma_kernels import DynamicMaskCache, FullCache, KeepRule, NewKeys, Packing
from dma_lightning import MIXERS, ModelConfig, TokenMixer

_SMALL = ModelConfig(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, backend="torch",
    kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, nsa_compress_hidden=16,
)  # fmt: skip


def check_key_caches(seed: int) -> None:
    """`DynamicMaskCache` and `FullCache`: chunks, single steps, partly accepted guesses, and selected rows."""
    rng = random.Random(seed)
    case = AttentionCase.drawn(rng, torch.float64)
    case = replace(case, scale=None, kept=replace(case.kept, window=min(case.kept.window, 60)))
    kind = rng.choice(("dynamic", "dynamic", "dynamic", "full"))
    with told(seed, f"{kind} cache, {case}"):
        reading = Reading(case, kind)
        while reading.left:
            reading.call(rng)


def check_triton_caches(seed: int) -> None:
    """`DynamicMaskCache` with a Triton kernel for steps of one position."""
    rng = random.Random(seed)
    case = AttentionCase.drawn(rng, torch.float32, longest=30)
    with told(seed, case):
        reading = Reading(replace(case, scale=None), "triton")
        while reading.left:
            reading.call(rng)


class Reading:
    """A cache that reads sequences, each at its own position, since different numbers of guesses are accepted.

    A drift, `[B, G, N]` in nats, is contained in the biases of the case. With one, the cache begins after `start` nats.
    """

    def __init__(self, case: AttentionCase, kind: str, drift: Tensor | None = None, start: float = 0.0) -> None:
        self.case, self.mask, self.full = case, case.mask(), kind == "full"
        self.expected = torch.from_numpy(case.expected()[0])
        batch, kv_heads, length, head_dim = case.inputs[1].shape
        kept = KeepRule(case.kept.window, case.kept.keep_last, case.kept.sinks)
        self.device = DEVICE if kind == "triton" else torch.device("cpu")
        backend = "triton" if kind == "triton" else "torch"
        options = {"dtype": case.grad.dtype, "backend": backend, "device": self.device}
        sizes = (batch, kv_heads, head_dim)
        self.cache = FullCache(batch, kept) if self.full else DynamicMaskCache(*sizes, kept, **options)
        self.length, self.drift, self.start = length, drift, start
        exact = 1e-9 if drift is None else 1e-6  # after 2^29 nats, float64 has steps of 1e-7
        self.allowed = exact if case.grad.dtype == torch.float64 else 2e-3
        self.rows, self.place = list(range(batch)), [0] * batch  # which sequence each row reads, and its position

    @property
    def left(self) -> int:
        """Number of positions that all rows still have ahead."""
        return self.length - max(self.place)

    def call(self, rng: random.Random) -> None:
        """Read the next positions, or select rows of the batch."""
        if rng.random() < 0.1:
            chosen = [rng.randrange(len(self.rows)) for _ in range(rng.randint(1, 3))]
            self.cache.select(torch.tensor(chosen, device=self.device))
            self.rows, self.place = ([x[i] for i in chosen] for x in (self.rows, self.place))
            return
        count = rng.choice((1, 1, 1, 2, 5, rng.randint(1, self.left), rng.randint(1, self.left)))
        count = min(count, self.left)
        (q, *inputs), ranks = [self._part(x, count) for x in self.case.inputs], self._part(self.case.ranks, count)
        packing = {name: self._packing(x, count) for name, x in self.case.packing.arguments().items()}
        asked = None
        if self.drift is not None:
            asked, inputs[2] = -self._part(self.drift, count) - self.start, inputs[2] + self.start
        new = NewKeys(*inputs, ranks, Packing.of(**packing), asked)
        if self.full or rng.random() < 0.7:
            out, kept = self.cache.attend(q, new), [count] * len(self.rows)
        else:
            out, kept = self.cache.verify(q, new), [rng.randint(0, count) for _ in self.rows]
            if rng.random() < 0.8:
                self.cache.commit(torch.tensor(kept, device=self.device))
            else:  # without commit, no guess is accepted
                kept = [0] * len(self.rows)
        right, allowed = self._part(self.expected, count).cpu(), self.allowed
        torch.testing.assert_close(out.double().cpu(), right, rtol=allowed, atol=allowed)
        self.place = [place + more for place, more in zip(self.place, kept, strict=True)]
        self._check_kept()

    def _part(self, x: Tensor, count: int) -> Tensor:
        """The next positions of `[B, heads, N, ...]`."""
        parts = zip(self.rows, self.place, strict=True)
        return torch.stack([x[row, :, at : at + count] for row, at in parts]).to(self.device)

    def _packing(self, x: Tensor | None, count: int) -> Tensor | None:
        """The next positions of `[B, N]`."""
        parts = zip(self.rows, self.place, strict=True)
        return None if x is None else torch.stack([x[row, at : at + count] for row, at in parts]).to(self.device)

    def _check_kept(self) -> None:
        """The last position sees the keys that the definition says, and no key is in two slots."""
        assert self.cache.length.tolist() == self.place
        if self.full or not any(self.place):
            return
        visible = self.cache.visible().cpu()
        for b, (row, place) in enumerate(zip(self.rows, self.place, strict=True)):
            for g in range(self.mask.shape[1]) if place else ():
                found = self.cache.state.position[b, g][visible[b, g]].tolist()
                assert sorted(found) == np.flatnonzero(self.mask[row, g, place - 1]).tolist(), "live set"


def check_mixers(seed: int) -> None:
    """Every mixer with its cache, token by token and in chunks, against one pass over the whole sequence."""
    rng = random.Random(seed)
    config = _drawn_config(rng)
    case = AttentionCase.drawn(rng, torch.float64, longest=70)  # only its documents and padding are used
    packing, (batch, _, length, _) = case.packing, case.grad.shape
    full = rng.random() < 0.3
    with told(seed, f"{config.attention}, full {full}, B {batch}, N {length}, {packing}, {config}"):
        mixer, x = _mixer(config, rng.getrandbits(32)), torch.randn(batch, length, 32, dtype=torch.float64)
        rows, cache, expected = torch.arange(batch), mixer.new_cache(batch, full), mixer(x, **packing.arguments())
        for start, stop in _cuts(rng, length):
            if rng.random() < 0.1:
                rows_now = torch.tensor([rng.randrange(len(rows)) for _ in range(rng.randint(1, 3))])
                cache.select(rows_now)
                rows = rows[rows_now]
            ids, pads = (None if y is None else y[rows, start:stop] for y in (packing.documents, packing.padding))
            out, right = mixer(x[rows, start:stop], ids, pads, cache), expected[rows, start:stop]
            if pads is not None:  # outputs at padded positions have no meaning
                out, right = out[~pads], right[~pads]
            torch.testing.assert_close(out, right, rtol=1e-8, atol=1e-8)
            assert cache.length.tolist() == [stop] * len(rows), "length"


def _cuts(rng: random.Random, length: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < length:
        stop = min(length, start + rng.choice((1, 1, 1, 2, 7, rng.randint(1, length))))
        yield start, stop
        start = stop


def _drawn_config(rng: random.Random) -> ModelConfig:
    stride = rng.choice((1, 2, 4))
    config = replace(
        _SMALL,
        attention=rng.choice(sorted(MIXERS)),
        backend=rng.choice(("torch", "reference")),
        keep_window_size=rng.choice((1, 3, 9, 80)),
        keep_last=rng.choice((0, 0, 2)),
        sinks=rng.choice((0, 0, 2)),
        score_form=rng.choice(("exp", "linear")),
        sliding_window=rng.choice((1, 3, 9, 80)),
        rope_scaling=rng.choice((1.0, 2.0)),
        attention_bias=rng.random() < 0.3,
        nsa_compress_stride=stride,
        nsa_compress_block=stride * rng.randint(1, 3),
        nsa_select_block=stride * rng.randint(1, 4),
        nsa_select_count=rng.randint(1, 5),
        nsa_window=rng.choice((1, 5, 80)),
        nsa_separate_kv=rng.random() < 0.7,
    )
    return config if rng.random() < 0.6 else replace(config, **_drawn_drift(rng))


def _drawn_drift(rng: random.Random) -> dict[str, Any]:
    memories = rng.choice((0, 0, 1))
    return {
        "drift": rng.choice(("constant", "gate")),
        "score_form": "exp" if memories and rng.random() < 0.5 else "linear",
        "memory_heads": memories,
        "memory_stripes": rng.choice((0, 3)) if memories else 0,
        "content": rng.choice(("values", "input")),
        "content_in_bias": rng.random() < 0.6,
        "drift_range": rng.choice(((0.125, 4.0), (1e-9, 1e-8), (100.0, 1000.0))),
    }


def _mixer(config: ModelConfig, seed: int) -> TokenMixer:
    """A mixer with random weights, so that every weight has an effect."""
    torch.manual_seed(seed)
    mixer = MIXERS[config.attention].from_config(config).double().requires_grad_(False).eval()
    for parameter in mixer.parameters():
        vector = parameter.ndim == 1
        nn.init.normal_(parameter, mean=float(vector), std=0.3 if vector else parameter.shape[-1] ** -0.5)
    return mixer
