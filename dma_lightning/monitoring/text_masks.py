"""Pictures of a trained model's masks over a text, without a trainer.

N length, G KV heads.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from dma_lightning.data.base import Batch
from dma_lightning.language_model import LanguageModel
from dma_lightning.monitoring.recording import masks_over
from dma_lightning.monitoring.samples import text_pieces
from dma_lightning.tokenizers import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = 64  # maximum number of tokens that are written on the axes
_SIDE = 3.2  # side of a mask in inches


def draw_text_masks(
    module: LanguageModel, tokenizer: Tokenizer, text: str, layers: Sequence[int] | None = None, block_size: int = 16
) -> "Figure":
    """Draw what each query of a text sees: a row of masks for each layer, one mask for each KV head.

    Args:
        module: a model with dynamic mask attention, such as `load_with_tokenizer` returns.
        tokenizer: tokenizer of the text; up to 64 tokens are written on the axes.
        text: at least one token, and at most as many as the model takes.
        layers: numbers of the layers to draw. Default: all.
        block_size: side of the outlined blocks (`Lifetimes.draw`).

    Raises:
        ValueError: for a text without tokens, a model without dynamic masks, or layers that have none.
        ImportError: without Matplotlib (`pip install dma-lightning[draw]`).
    """
    tokens = tokenizer.encode(text)
    if not tokens:
        raise ValueError("text: expected at least one token, got none")
    batch = cast("Batch", {"input_ids": torch.tensor([tokens], device=module.device)})  # no labels
    masks = masks_over(module.model, batch)
    if not masks:
        raise ValueError(f"expected a model with dynamic mask attention, got {module.model.config.attention}")
    chosen = sorted(masks) if layers is None else list(layers)
    if not chosen or set(chosen) - masks.keys():
        raise ValueError(f"layers: expected some of {sorted(masks)}, got {chosen}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing masks needs Matplotlib: pip install 'dma-lightning[draw]'") from error

    heads = masks[chosen[0]].lifetimes.death.shape[1]
    figure = Figure(figsize=(_SIDE * heads, _SIDE * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), heads, squeeze=False)
    pieces = text_pieces(tokenizer, tokens)
    for row, layer in zip(grid, chosen, strict=True):
        for head, axes in enumerate(row):
            masks[layer].lifetimes.draw(head=head, block_size=block_size, axes=axes)
            axes.set_title(f"layer {layer}, KV head {head}", fontsize=8)
            if len(tokens) <= _LABELS:
                axes.set_xticks(range(len(tokens)), pieces, rotation=90, fontsize=5)
                axes.set_yticks(range(len(tokens)), pieces, fontsize=5)
    return figure
