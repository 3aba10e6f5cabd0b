"""What dynamic masks did: figures of their layers at the end of trainings."""

import re
from collections.abc import Sequence
from statistics import fmean

import torch

from benchmarks.evidence.results import Record
from dma_lightning.monitoring.lost_mass import efficiency

FIGURES = {
    "lost_mass": "lost mass",
    "lost_mass_window": "that of a window",
    "lost_mass_best": "that of the best keys",
    "efficiency": "efficiency",
    "own_key_late": "own key seen",
}
"""The curves `dma/layer_I/NAME` that the report shows, by NAME, and what the report calls them."""

_LAYER = re.compile(r"dma/layer_\d+/(\w+)")


def looked_at(record: Record) -> bool:
    """Whether a training has logged any figure that the report shows."""
    return any(found[1] in FIGURES for tag in record.curves if (found := _LAYER.fullmatch(tag)))


def mask_figures(records: Sequence[Record]) -> dict[str, float]:
    """The last values of all curves of dynamic masks, as means over layers and seeds, by name.

    The efficiency is computed from the mean masses. In a mean of the layers' efficiencies, the layers with the least to
    gain would dominate. It is left out if there is nothing to gain at all.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        for tag, curve in record.curves.items():
            if (found := _LAYER.fullmatch(tag)) and (last := curve[-1][1]) is not None:
                values.setdefault(found[1], []).append(last)
    values.pop("efficiency", None)
    figures = {name: fmean(own) for name, own in values.items()}
    masses = [figures[name] for name in ("lost_mass", "lost_mass_window", "lost_mass_best") if name in figures]
    if len(masses) == 3:
        share = float(efficiency(*torch.tensor(masses, dtype=torch.float64)))
        figures |= {"efficiency": share} if share == share else {}  # NaN where there is nothing to gain
    return figures
