"""A cache of constant size for `generate` of Transformers.

B batch, H query heads, G KV heads, n new positions, D head dim.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from dma_kernels import DynamicMaskCache, NewKeys
from dma_kernels.decoding.attention import Attention
from dma_lightning.backends import resolve_backend
from dma_lightning.transformers.layers import DynamicMask, SlidingWindow, attention_layers


class DynamicMasksCache(Cache):
    """An exact cache for models with dynamic masks: it holds at most `w + r + s` keys per layer, those still visible.

    Pass it as `past_key_values` to `generate` or to the model. A model updates its cache before its attention, when it
    is not yet known which keys stay. So `update` returns only the new keys, and the attention function reads the slots.
    The cache supports reordering rows (beam search) and removing guessed tokens (assisted generation).

    Raises:
        ValueError: if the model has no dynamic masks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers: list[Any] = [*attention_layers(model)]  # torch types no attributes of modules
        if not all(hasattr(layer, "dynamic_mask") for layer in layers):
            raise ValueError(
                f"{type(model).__name__}: expected a model with dynamic masks; call add_dynamic_masks first"
            )
        super().__init__(layers=[_CacheLayer(layer.dynamic_mask) for layer in layers])


class _CacheLayer(CacheLayerMixin):
    """The slots of a layer, and the number of positions it has read."""

    is_sliding = False
    supports_early_init = False  # the number of sequences is known only from the first keys

    def __init__(self, mask: DynamicMask | SlidingWindow) -> None:
        super().__init__()
        self.keep, self.backend = mask.keep, mask.backend
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.slots: DynamicMaskCache | None = None
        self.length, self.guessed = 0, 0
        self.unread = False  # whether the attention has yet to read some keys
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads, _, head_dim = key_states.shape
        device, dtype = key_states.device, key_states.dtype
        backend = resolve_backend(self.backend, device.type, device.index, dtype, head_dim)
        self.slots = DynamicMaskCache(
            batch, kv_heads, head_dim, self.keep, dtype=dtype, device=device,
            backend="triton" if backend == "triton" else "torch",
        )  # fmt: skip
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.unread:
            raise ValueError(
                "expected the attention of the last call to have read its keys, but it has not; choose "
                "attn_implementation 'dma' and make a new cache"
            )
        self.unread = True
        self.length += key_states.shape[2]
        return key_states, value_states

    def attend(self, q: Tensor, new: NewKeys, attention: Attention) -> Tensor:
        """Attend from new positions to the slots and the new keys, `[B, H, n, D]`, and keep the keys still visible."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, new.key, new.value, new.key_bias)):
            raise ValueError("expected inference, since this cache has no gradients; train with use_cache=False")
        if self.slots is None:
            self.lazy_initialization(new.key, new.value)
        assert self.slots is not None
        self._commit(self.guessed)
        if self.record_past:
            out, self.guessed = self.slots.verify(q, new, attention), q.shape[2]
        else:
            out = self.slots.attend(q, new, attention)
        self.unread = False
        return out

    def activate_past_recording(self) -> None:
        """From now on, keep a call's keys separate until `crop` or the next call shows how many were right."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the last call.

        Args:
            tokens_to_remove: how many, as a negative number, as in Transformers.

        Raises:
            ValueError: if these are more than the last call read, or past recording is off.
        """
        wrong = -tokens_to_remove
        if not 0 <= wrong <= self.guessed:
            raise ValueError(
                f"tokens_to_remove: expected -{self.guessed} to 0, since {self.guessed} tokens were read after "
                f"activate_past_recording and the last crop, got {tokens_to_remove}"
            )
        self._commit(self.guessed - wrong)
        self.length -= wrong

    def _commit(self, count: int) -> None:
        """Keep the first `count` positions that `verify` has seen."""
        if self.guessed and self.slots is not None:
            self.slots.commit(torch.full_like(self.slots.length, count))
        self.guessed = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number and first position of the keys that `update` returns: the new ones."""
        return query_length, self.length

    def get_seq_length(self) -> int:
        """Positions read so far, including padding."""
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self.slots is not None:
            self._commit(self.guessed)
            self.slots.select(indices.to(self.slots.length.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.slots is not None:
            rows = torch.arange(len(self.slots.length), device=self.slots.length.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def pass_cache_on(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before a layer: pass the cache on to the attention function; Transformers gives it only to the layer."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, DynamicMasksCache):
            return args, kwargs | {"dynamic_masks_cache": x}
    return None
