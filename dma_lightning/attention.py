"""Dynamic mask attention as a module.

B batch, N length, C hidden size, H query heads, G KV heads, D head dim.
"""

import torch
from torch import Tensor, nn

from dma_kernels import DynamicMaskCache, FullCache, KeyCache, ScoreForm, key_ranks, key_scores
from dma_lightning.backends import ATTENTIONS, Backend, Selection, attend, check_backend, resolve_backend
from dma_lightning.rotary import apply_rotary


class DynamicMaskAttention(nn.Module):
    """Causal self-attention in which every query keeps the `keep_window_size` best-scored keys of its past.

    The score of a key comes from the values at its position, selects the key, and is added to its logits, so the
    selection is trained. With `A = 0`, as initialised, this is exactly sliding-window attention (plus the sinks and
    last positions that are asked for).

    Args:
        hidden_size: C, width of input and output.
        num_heads: H, query heads.
        num_kv_heads: G, key and value heads; H must be a multiple of it. Default: H.
        head_dim: D, even. Default: C / H.
        keep_window_size: keys that a query keeps.
        keep_last: positions that stay visible besides, whatever their rank.
        sinks: first keys of each document that stay visible besides.
        score_form: what is added to the logits, `exp(rank)` or the rank itself (`linear`).
        rope_theta: base of the rotary embedding.
        rope_scaling: positions are divided by it before the rotary embedding.
        rms_norm_eps: epsilon of the RMSNorm on queries and keys.
        bias: whether the projections and Δ have a bias.
        backend: `triton`, `flex`, `torch` or `reference`; `auto` is `triton` on CUDA where its tests have passed
            (Hopper GPUs), else `flex`, else `torch` (on a CPU, in float64, for head dims above 256).

    Raises:
        ValueError: if the sizes do not belong together, or for an unknown backend or score form.

    Source: arXiv 2508.02124v6, section 3; details as in the Doge model of Hugging Face Transformers.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        keep_window_size: int = 1024,
        keep_last: int = 0,
        sinks: int = 0,
        score_form: ScoreForm = "exp",
        rope_theta: float = 10_000.0,
        rope_scaling: float = 1.0,
        rms_norm_eps: float = 1e-6,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}; or set head_dim"
            )
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: rotary embedding needs an even number >= 2, got {head_dim}")
        if keep_window_size < 1 or keep_last < 0 or sinks < 0:
            raise ValueError(
                "expected keep_window_size >= 1, keep_last >= 0 and sinks >= 0, "
                f"got {keep_window_size}, {keep_last} and {sinks}"
            )
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.keep_window_size, self.keep_last, self.sinks = keep_window_size, keep_last, sinks
        self.score_form, self.rope_theta, self.rope_scaling = score_form, rope_theta, rope_scaling
        check_backend(backend)
        self.backend = backend

        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps)
        self.A = nn.Parameter(torch.zeros(num_kv_heads))
        self.dt_proj = nn.Linear(num_kv_heads * head_dim, num_kv_heads, bias=bias)  # Δ
        key_scores(self.A.detach(), score_form)  # an unknown form is an error now, not in the first step

    def forward(
        self,
        x: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        cache: KeyCache | None = None,
    ) -> Tensor:
        """Attend within each sequence, and to what its cache has read before.

        Args:
            x: `[B, N, C]`.
            documents: integer document ids `[B, N]`; a document is a run of equal ids and sees itself alone.
            padding: bool `[B, N]`, True at padded positions, which nobody sees.
            cache: of `new_cache`; x goes on where it ends, and is added to it. For inference.

        Returns:
            `[B, N, C]`.

        Raises:
            ValueError: on a wrong shape, dtype or device.
        """
        if x.ndim != 3 or x.shape[-1] != self.hidden_size or x.shape[1] == 0:
            raise ValueError(f"expected x [B, N >= 1, {self.hidden_size}], got {list(x.shape)}")
        weight = self.q_proj.weight
        if x.device != weight.device or (x.dtype != weight.dtype and not _autocasts(x)):
            raise ValueError(
                f"expected x {weight.dtype} on {weight.device} as the weights, got {x.dtype} on {x.device}; "
                "convert or move x or the module, or use autocast"
            )
        q, k, v = self._project(x, cache)
        ranks = key_ranks(v, self.A, self.dt_proj.weight, self.dt_proj.bias)  # [B, G, N]
        scores = key_scores(ranks, self.score_form)
        backend = resolve_backend(self.backend, q.device.type, q.device.index, q.dtype, self.head_dim)
        if cache is None:
            selection = Selection(self.keep_window_size, self.keep_last, self.sinks, documents, padding)
            out = attend(backend, q, k, v, scores, ranks, selection)  # [B, H, N, D]
        else:
            out = cache.attend(q, k, v, scores, ranks, documents, padding, ATTENTIONS[backend])
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def new_cache(self, batch: int, full: bool = False, dtype: torch.dtype | None = None) -> KeyCache:
        """An empty cache for `batch` sequences on the module's device.

        Args:
            batch: B.
            full: keep every key, for comparison or to change `keep_window_size` of the cache later.
            dtype: of keys and values in the small cache. Default: that of autocast, if it is on, or of the weights.

        The small cache steps by a Triton kernel where the module's backend is `triton`, else by plain PyTorch.
        """
        weight, kv_heads = self.k_proj.weight, self.A.numel()
        selection = (self.keep_window_size, self.keep_last, self.sinks)
        if full:
            return FullCache(batch, *selection, device=weight.device)
        device = weight.device
        if dtype is None:
            autocasts = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocasts else weight.dtype
        backend = resolve_backend(self.backend, device.type, device.index, dtype, self.head_dim)
        step = "triton" if backend == "triton" else "torch"
        return DynamicMaskCache(batch, kv_heads, self.head_dim, *selection, dtype, device, step)

    def _project(self, x: Tensor, cache: KeyCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, rotated queries `[B, H, N, D]` and keys, and values `[B, G, N, D]`, in one dtype."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q).to(v.dtype).transpose(1, 2), self.k_norm(k).to(v.dtype).transpose(1, 2)
        positions = None
        if cache is not None:
            positions = cache.length[:, None] + torch.arange(x.shape[1], device=x.device)
        q, k = (apply_rotary(y, self.rope_theta, positions, self.rope_scaling) for y in (q, k))
        return q, k, v.transpose(1, 2)


def _autocasts(x: Tensor) -> bool:
    """Whether a linear layer would convert `x` by itself."""
    device = x.device.type
    return x.is_floating_point() and device != "meta" and torch.is_autocast_enabled(device)
