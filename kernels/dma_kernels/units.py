"""The unit of ranks with a drift, which are integers; `fixed_point.py` says why, and what the bounds mean."""

from torch import Tensor

FRACTION_BITS = 32
UNIT = 2.0**-FRACTION_BITS  # nats
LARGEST = 1 << 61  # bound of a content and of D, in units; content + D, or the sum of two D, still fits into int64
NAN_RANK = (1 << 63) - 1


def in_units(nats: Tensor) -> Tensor:
    """Nats as whole units, int64, within the range above; NaN is 0."""
    return (nats.detach().double() / UNIT).round().nan_to_num(0.0).clamp(-LARGEST, LARGEST).long()
