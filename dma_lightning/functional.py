"""Dynamic mask attention as one function, for your own modules.

B batch, H query heads, G KV heads, N length, D head dim.
"""

import torch
from torch import Tensor

from dma_kernels import KeepRule, Packing, ScoreForm, rank_bias
from dma_lightning.backends import Backend, attend, check_backend, resolve_backend


def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Tensor,
    keep_window_size: int,
    *,
    keep_last: int = 0,
    sinks: int = 0,
    score_form: ScoreForm = "exp",
    key_bias: Tensor | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention in which each query sees the best-ranked keys of its past, with a bias for each key.

    Differentiable in q, k, v, and, through their bias, in the ranks. `dma_kernels.key_ranks` computes ranks from values
    as published.

    Args:
        q: queries `[B, H, N, D]`, with position embeddings.
        k: keys `[B, G, N, D]`, H a multiple of G.
        v: values `[B, G, N, D]`.
        ranks: floating `[B, G, N]`, or int64 together with a `key_bias`; of two equal ranks, the later key wins.
        keep_window_size: w, how many best-ranked keys a query sees.
        keep_last: how many last positions a query sees whatever their rank; the w keys are chosen from those before.
        sinks: how many first keys of its document a query also sees.
        score_form: what is added to the logits of a key: `exp(rank)` (`exp`) or the rank itself (`linear`).
        key_bias: added instead of `score_form`, `[B, G, N]` in at least float32; zeros give selection without a bias.
        documents: integer ids `[B, N]`; a run of equal ids is a document and sees only itself.
        padding: bool `[B, N]`, True at padded positions, which no query sees.
        scale: factor of q·k. Default: `1 / sqrt(D)`.
        backend: `triton`, `flex`, `torch` or `reference`; `auto` is the fastest that was tested on the device.

    Returns:
        `[B, H, N, D]` in the dtype of q.

    Raises:
        ValueError: if shapes, dtypes, devices or sizes do not fit together, or the backend does not support the
            request.

    Source: arXiv 2508.02124v6, section 3.
    """
    check_backend(backend)
    if ranks.shape != k.shape[:3]:
        raise ValueError(f"ranks: expected {list(k.shape[:3])} to match k, got {list(ranks.shape)}")
    if key_bias is None and not ranks.is_floating_point():
        raise ValueError(
            f"ranks: expected floating-point numbers to compute biases from, got {ranks.dtype}; for integer ranks, "
            "also give a key_bias"
        )
    bias_of_ranks = rank_bias(ranks.to(torch.promote_types(q.dtype, torch.float32)), score_form)
    key_bias = bias_of_ranks if key_bias is None else key_bias
    packing = Packing.of(documents, padding, batch=q.shape[0], like=ranks)
    backend_name = resolve_backend(backend, q.device.type, q.device.index, q.dtype, q.shape[-1])
    keep = KeepRule(keep_window_size, keep_last, sinks)
    return attend(backend_name, q, k, v, key_bias, ranks, keep, packing, scale=scale)
