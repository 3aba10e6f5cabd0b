"""The unit of ranks with a drift. These ranks are integers; `fixed_point.py` says why, and what the bounds mean."""

from torch import Tensor

FRACTION_BITS = 32
UNIT = 2.0**-FRACTION_BITS  # nats
LARGEST = 1 << 61  # the bound of contents and of D, in units; content + D, or D + D, still fits into int64
NAN_RANK = (1 << 63) - 1


def in_units(nats: Tensor) -> Tensor:
    """Nats in whole units, int64, limited to +-LARGEST; NaN becomes 0."""
    return (nats.detach().double() / UNIT).round().nan_to_num(0.0).clamp(-LARGEST, LARGEST).long()
