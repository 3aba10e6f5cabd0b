"""Dynamic mask attention as an attention function of Transformers.

B batch, H query heads, G KV heads, n queries, N keys, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dma_kernels import Lifetimes, NewKeys, Packing
from dma_kernels.decoding.attention import decode_attention
from dma_kernels.decoding.dynamic_cache import FEW
from dma_kernels.keep_rule import KeepRule
from dma_lightning.backends import ATTENTIONS, attend, resolve_backend
from dma_lightning.transformers.layers import DynamicMask, SlidingWindow

# Options that models pass to their attention and that would change its result.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask", "output_attentions", "cache")


def dynamic_mask_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Packing | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute the attention of a layer prepared by `add_dynamic_masks`, with the signature of `AttentionInterface`.

    Args:
        module: the layer.
        query: `[B, H, n, D]`, after the rotary embedding, at the last n of the keys' positions.
        key: `[B, G, N, D]`, after the rotary embedding.
        value: same shape as `key`.
        attention_mask: documents and padding of the N keys, from `packing_of`.
        options: `scaling`, `sliding_window` and `dynamic_masks_cache`, whose keys precede these.

    Returns:
        The output `[B, n, H, D]`, and None instead of attention weights.

    Raises:
        ValueError: for a layer without a dynamic mask, and for unsupported options.
    """
    mask = getattr(module, "dynamic_mask", None)
    if not isinstance(mask, DynamicMask | SlidingWindow):
        raise ValueError(
            f"expected a layer of a model with dynamic masks, got {type(module).__name__} without "
            "a dynamic mask; call add_dynamic_masks, or choose another attn_implementation"
        )
    _check_options(module, mask, options)
    packing = _checked_packing(attention_mask, key, options)
    ranks, key_bias = mask(value)  # [B, G, N]
    query, key, value = _in_dtype_of_autocast(query, key, value)
    scaling = options.get("scaling")
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)
    new = NewKeys(key, value, key_bias, ranks, packing)
    backend = resolve_backend(mask.backend, query.device.type, query.device.index, query.dtype, query.shape[-1])
    cache = options.get("dynamic_masks_cache")
    if cache is not None:
        out = cache.layers[module.layer_idx].attend(query, new, ATTENTIONS[backend])
    elif query.shape[2] == key.shape[2]:
        out = attend(backend, query, key, value, key_bias, ranks, mask.keep, packing)
    else:
        out = _attend_from_last(backend, query, new, mask.keep)
    return out.transpose(1, 2).contiguous(), None


def _attend_from_last(backend: str, q: Tensor, keys: NewKeys, keep: KeepRule) -> Tensor:
    """Attention `[B, H, n, D]` of the last n of N positions, for a Transformers cache that keeps all keys."""
    lifetimes = Lifetimes.selected(keys.rank, keep, keys.packing)
    past = keys.rank.shape[-1] - q.shape[2]
    if past < 0:
        raise ValueError(f"expected at least {q.shape[2]} keys for as many queries, got {keys.rank.shape[-1]}")
    if q.shape[2] <= FEW:
        at = torch.arange(past, past + q.shape[2], device=q.device)[:, None]
        visible = (lifetimes.birth[..., None, :] <= at) & (at < lifetimes.death[..., None, :])  # [B, G, n, N]
        return decode_attention(q, keys.key, keys.value, keys.key_bias, visible)
    q = F.pad(q, (0, 0, past, 0))  # past positions have no queries
    return ATTENTIONS[backend](q, keys.key, keys.value, keys.key_bias, lifetimes)[:, :, past:]


def _check_options(module: nn.Module, mask: DynamicMask | SlidingWindow, options: dict[str, Any]) -> None:
    """Raise `ValueError` for unsupported options that would change the result."""
    name = type(module).__name__
    for option in _UNKNOWN:
        if options.get(option) is not None and options[option] is not False:
            raise ValueError(f"{name}: expected no {option}, which dynamic masks do not support; leave it out")
    if options.get("dropout"):
        raise ValueError(f"{name}: expected no dropout of attention weights, got {options['dropout']}; set it to 0")
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f"{name}: expected causal attention, got is_causal=False; dynamic masks are causal")
    window = options.get("sliding_window")
    if window is not None and window != mask.sliding_window:
        raise ValueError(
            f"{name}: expected sliding_window {mask.sliding_window}, as in the call of add_dynamic_masks, got {window}"
        )


def _checked_packing(packing: Packing | None, key: Tensor, options: dict[str, Any]) -> Packing | None:
    """Check documents and padding, and move them to the device of the keys."""
    if packing is not None and not isinstance(packing, Packing):
        raise ValueError(
            f"attention_mask: expected None or 0/1 [B, N] in the call of the model, got {type(packing).__name__} "
            f"{list(getattr(packing, 'shape', []))}; dynamic mask attention creates its own mask"
        )
    lengths = options.get("cu_seq_lens_k")
    if lengths is not None and len(lengths) > 2 and (packing is None or packing.documents is None):
        raise ValueError(
            "cu_seq_lens_k: expected position_ids that restart at each document, which mark the documents, without "
            "attention_mask and with use_cache=False, got none"
        )
    if packing is None or all(x is None or x.device == key.device for x in (packing.documents, packing.padding)):
        return packing
    parts = (packing.documents, packing.padding, packing.runs)
    return Packing(*(None if x is None else x.to(key.device) for x in parts))


def _in_dtype_of_autocast(*tensors: Tensor) -> list[Tensor]:
    """All tensors in autocast's dtype, as in scaled_dot_product_attention: models rotate all but values in float32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]
