"""One position enters a cache and attends to it, by one Triton kernel: the twin of `DynamicMaskCache`'s plain step.

B batch, H query heads, G KV heads, D head dim, C slots.
"""

import torch
from torch import Tensor


@torch.library.custom_op(
    "dma_kernels::decode_step",
    mutates_args=("key", "value", "score", "rank", "position", "ranked", "sink", "length", "seen", "arrivals"),
)
def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    ranks: Tensor,
    real: Tensor | None,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    rank: Tensor,
    position: Tensor,
    ranked: Tensor,
    sink: Tensor,
    length: Tensor,
    seen: Tensor,
    arrivals: Tensor,
    keep_window_size: int,
    keep_last: int,
    sinks: int,
) -> Tensor:
    """Output `[B, H, 1, D]` of one position within its document; opaque to torch.compile. For a cache made for it.

    Args:
        q: `[B, H, 1, D]`.
        k: `[B, G, 1, D]`.
        v: `[B, G, 1, D]`.
        scores: float32 `[B, G, 1]`.
        ranks: floating `[B, G, 1]`, compared in float32.
        real: bool `[B]`, False at padding; None if all are real.
        key: of the cache, as all up to `seen` changed in place; see `DynamicMaskCache`.
        value: of the cache.
        score: of the cache.
        rank: of the cache.
        position: of the cache.
        ranked: of the cache.
        sink: of the cache.
        length: of the cache, `[B, G]`: each KV head counts for itself.
        seen: of the cache, `[B, G]`.
        arrivals: int32 `[B, G]`, zeros between calls.
        keep_window_size: w.
        keep_last: r.
        sinks: s.
    """
    from dma_kernels.decoding.kernels import launch_decode_step

    with torch.cuda.device_of(q):  # Triton launches on the current device
        return launch_decode_step(
            q, k, v, scores, ranks, real, key, value, score, rank, position, ranked, sink, length, seen, arrivals,
            keep_window_size, keep_last, sinks,
        )  # fmt: skip


@decode_step.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
