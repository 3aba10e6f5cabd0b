"""Documents and padding, found in the masks of Transformers.

B batch, n queries, N keys.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from dma_kernels import Packing

MaskFunction = Callable[[Any, Any, Any, Any], Any]  # (row, head, query, key) -> whether the query sees the key


def packing_of(
    *, batch_size: int, q_length: int, kv_length: int, q_offset: Any, kv_offset: int, mask_function: MaskFunction,
    attention_mask: Tensor | None, **options: Any,
) -> Packing | None:  # fmt: skip
    """Find documents and padding of the N keys, which `AttentionMaskInterface` passes to each layer.

    Args:
        batch_size: B.
        q_length: n; the queries are at the last n of the keys' positions.
        kv_length: N.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: which keys the model lets a query see; a document starts where a query does not see the key
            before it.
        attention_mask: bool `[B, positions read so far]`, False at padding; None if there is no padding.
        options: only `device` and `use_vmap` are used; `use_vmap` is set for a user's own mask function.

    Raises:
        ValueError: for a static cache, for a mask that is not causal, and for a user's own mask function.
    """
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"expected keys up to the last query, got {kv_length} keys from position {kv_offset} on and {q_length} "
            f"queries from {q_offset} on; use DynamicMasksCache or DynamicCache, and an attention_mask with one entry "
            "for each position read so far"
        )
    if options.get("use_vmap"):
        raise ValueError("expected the model's own causal mask, got another mask function; leave it out")
    documents = padding = None
    if mask_function is not causal_mask_function and q_offset == 0 and q_length > 1:
        documents = _documents(mask_function, batch_size, q_length, options["device"])
    if attention_mask is not None:
        padding = ~attention_mask.bool()[:, kv_offset : kv_offset + kv_length]
        if padding.shape != (batch_size, kv_length):
            raise ValueError(
                f"attention_mask: expected [{batch_size}, {kv_offset + kv_length}], an entry for each position read so "
                f"far, got {list(attention_mask.shape)}"
            )
    return Packing.of(documents, padding)


def _documents(mask_function: MaskFunction, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Document number of each position, `[B, n]`, or None if each row is one document.

    A sliding window lets every query see the key before it, so it marks no documents.
    """
    row, head = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)
    position = torch.arange(length, device=device)[None]
    if mask_function(row, head, position[:, :-1], position[:, 1:]).any():
        raise ValueError("expected a causal mask, got one in which a query sees the next key")
    begins = ~mask_function(row, head, position[:, 1:], position[:, :-1])
    if not begins.any():
        return None
    return F.pad(begins.long().cumsum(-1), (1, 0)).expand(batch, -1)
