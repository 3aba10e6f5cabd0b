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
    """What the layers of a model of `add_dynamic_masks` can still see: at most `w + r + s` keys each, and exact.

    For `past_key_values`, in `generate` and in calls of the model. A model updates a cache before its attention, when
    nobody knows yet which keys stay, so `update` gives the new keys back and the attention function reads the slots.
    Rows may be reordered (beam search) and guessed tokens taken back (assisted generation).

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
    """The slots of a layer, and how many positions it has read."""

    is_sliding = False
    supports_early_init = False  # only the first keys tell how many sequences there are

    def __init__(self, mask: DynamicMask | SlidingWindow) -> None:
        super().__init__()
        self.keep, self.backend = mask.keep, mask.backend
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.slots: DynamicMaskCache | None = None
        self.length, self.guessed = 0, 0
        self.unread = False  # whether there are keys that no attention has read
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
                "expected that the attention of the last call had read its keys, but it had not; choose "
                "attn_implementation 'dma' and make a new cache"
            )
        self.unread = True
        self.length += key_states.shape[2]
        return key_states, value_states

    def attend(self, q: Tensor, new: NewKeys, attention: Attention) -> Tensor:
        """Attend from new positions to the slots and themselves, `[B, H, n, D]`, and keep what later ones can see."""
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
        """From now on, keep the keys of a call apart until `crop` or the next call tells how many were right."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last so many tokens, told as a negative number as Transformers does, of the last call."""
        wrong = -tokens_to_remove
        if not 0 <= wrong <= self.guessed:
            raise ValueError(
                f"expected to take back at most the {self.guessed} tokens that were read since "
                f"activate_past_recording and the last crop, as -{self.guessed}, got {tokens_to_remove}"
            )
        self._commit(self.guessed - wrong)
        self.length -= wrong

    def _commit(self, count: int) -> None:
        """Keep so many of the positions that `verify` has seen."""
        if self.guessed and self.slots is not None:
            self.slots.commit(torch.full_like(self.slots.length, count))
        self.guessed = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first position of the keys that `update` gives back: the new ones."""
        return query_length, self.length

    def get_seq_length(self) -> int:
        """Positions read so far, padding included."""
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
        """Have each sequence so many times."""
        if self.slots is not None:
            rows = torch.arange(len(self.slots.length), device=self.slots.length.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def pass_cache_on(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before a layer: have its attention function see the cache, which Transformers gives to the layer alone."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, DynamicMasksCache):
            return args, kwargs | {"dynamic_masks_cache": x}
    return None
