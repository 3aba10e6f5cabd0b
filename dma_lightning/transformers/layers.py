"""The modules that attention layers of a Transformers model get, and the search for these layers.

B batch, G KV heads, N length, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dma_kernels import KeepRule, ScoreForm, key_ranks, rank_bias
from dma_lightning.backends import Backend


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How the layers of a model select their keys; `config.json` holds it as `dynamic_masks`.

    Attributes:
        keep_window_size: number of best-ranked keys that a query keeps.
        keep_last: number of last positions that are visible regardless of rank; the best-ranked keys are chosen from
            the positions before them.
        sinks: number of first keys of each document that also stay visible.
        score_form: what is added to the logits: `exp` of the rank, or the rank itself (`linear`).

    Raises:
        ValueError: if a size is out of range or the form unknown.
    """

    keep_window_size: int
    keep_last: int = 0
    sinks: int = 0
    score_form: ScoreForm = "exp"

    def __post_init__(self) -> None:
        rank_bias(torch.zeros(1), self.score_form)  # fails on an unknown form now, not in the first step
        KeepRule(self.keep_window_size, self.keep_last, self.sinks)  # fails on a size out of range

    @property
    def keep(self) -> KeepRule:
        """The keep rule with these sizes."""
        return KeepRule(self.keep_window_size, self.keep_last, self.sinks)


class DynamicMask(nn.Module):
    """Computes ranks and biases of a layer's keys from its values. Initially `A = 0`, which makes a sliding window.

    Args:
        num_kv_heads: G.
        head_dim: D.
        settings: how keys are selected.
        backend: computes the attention.
        like: a parameter of the layer; the new parameters go to its device.
        dtype: dtype of the new parameters.
    """

    sliding_window: int | None = None

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        settings: MaskSettings,
        backend: Backend,
        like: Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.keep, self.score_form, self.backend = settings.keep, settings.score_form, backend
        self.A = nn.Parameter(torch.zeros(num_kv_heads, device=like.device, dtype=dtype))
        self.dt_proj = nn.Linear(num_kv_heads * head_dim, num_kv_heads, bias=False, device=like.device, dtype=dtype)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Ranks and biases `[B, G, N]` of keys with values `[B, G, N, D]`."""
        ranks = key_ranks(values, self.A, self.dt_proj.weight)
        return ranks, rank_bias(ranks, self.score_form)


class SlidingWindow(nn.Module):
    """For a layer with the model's own sliding window: all keys have equal ranks, so the latest win."""

    def __init__(self, sliding_window: int, backend: Backend) -> None:
        super().__init__()
        self.sliding_window, self.backend = sliding_window, backend
        self.keep = KeepRule(sliding_window)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Ranks and biases `[B, G, N]`, all zero."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        zeros = torch.zeros(values.shape[:3], dtype=dtype, device=values.device)
        return zeros, zeros


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Attention layers of a model from first to last, found by their Transformers names and numbers.

    Raises:
        ValueError: if there are none, or not exactly one for each number.
    """
    named = [x for x in model.modules() if "Attention" in type(x).__name__ and hasattr(x, "layer_idx")]
    if not named or [x.layer_idx for x in named] != list(range(len(named))):
        raise ValueError(
            f"{type(model).__name__}: expected a decoder with one attention module in each layer, named ...Attention "
            f"and numbered by layer_idx, got {[getattr(x, 'layer_idx', None) for x in named]}"
        )
    return named
