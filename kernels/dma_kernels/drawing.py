"""Pictures of masks. Matplotlib is an optional dependency, and is imported on the first call."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PIXELS = 384  # minimum side of a picture in a notebook
_EMPTY, _PARTIAL, _FULL = "#c8c8c8", "#e08214", "#1b7837"


def draw_mask(mask: Tensor, block_size: int = 16, axes: "Axes | None" = None) -> "Figure":
    """Draw one bool mask `[queries, keys]`; a block is outlined gray if empty, orange if partial, green if full.

    Args:
        mask: True where a query sees a key.
        block_size: side of the outlined blocks.
        axes: where to draw; by default in a new figure.

    Raises:
        ValueError: if `mask` is not two-dimensional, or `block_size` is below 1.
        ImportError: without Matplotlib (`pip install dma-lightning[draw]`).
    """
    if mask.ndim != 2 or block_size < 1:
        raise ValueError(
            f"expected a mask [queries, keys] and block_size >= 1, got {list(mask.shape)} and {block_size}"
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("drawing a mask needs Matplotlib: pip install 'dma-lightning[draw]'") from error

    rows, columns = mask.shape
    if axes is None:
        axes = Figure(figsize=(5.2, 5.2 * rows / columns), layout="constrained").add_subplot()
    axes.imshow(mask.cpu().float().numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    for row, fills in enumerate(_block_fills(mask.cpu(), block_size).tolist()):
        for column, fill in enumerate(fills):
            color = _EMPTY if fill == 0 else _FULL if fill == 1 else _PARTIAL
            corner = (column * block_size - 0.42, row * block_size - 0.42)
            axes.add_patch(Rectangle(corner, block_size - 0.16, block_size - 0.16, fill=False, ec=color, lw=1))
    axes.set(xlabel="key j", ylabel="query t", xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    figure: Any = axes.figure  # a SubFigure, if the given axes are in one
    return figure


def mask_png(birth: Tensor, death: Tensor) -> bytes | None:
    """A PNG of the mask of one head, for notebooks; a long mask is drawn at evenly spaced queries and keys.

    Args:
        birth: first query that sees each key, `[N]`.
        death: first later query that no longer sees it, `[N]`.

    Returns:
        The bytes of the file; None without Matplotlib.
    """
    place = torch.linspace(0, len(death) - 1, min(len(death), _PIXELS), device=death.device).round().long()
    visible = (birth[place] <= place[:, None]) & (place[:, None] < death[place])
    try:
        from matplotlib.image import imsave
    except ImportError:
        return None
    pixels = -(-_PIXELS // len(place))
    picture = visible.cpu().repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    file = BytesIO()
    imsave(file, picture.float().numpy(), cmap="Blues", vmin=0, vmax=1.4, format="png")
    return file.getvalue()


def _block_fills(mask: Tensor, block_size: int) -> Tensor:
    """Visible share of every block, `[block rows, block columns]`; positions outside the mask do not count."""
    pad = (0, -mask.shape[1] % block_size, 0, -mask.shape[0] % block_size)
    visible, inside = (F.pad(x.double(), pad) for x in (mask, torch.ones_like(mask)))
    visible, inside = (F.avg_pool2d(x[None], block_size)[0] for x in (visible, inside))
    return visible / inside
