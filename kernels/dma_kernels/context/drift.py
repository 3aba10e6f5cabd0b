"""How far keys have drifted before a part begins: sums over earlier processes.

B batch, G KV heads.
"""

from torch import Tensor

from dma_kernels.context.group import ContextGroup
from dma_kernels.units import LARGEST


def drift_before(group: ContextGroup, units: Tensor, nats: Tensor) -> tuple[Tensor, Tensor]:
    """The drift of all earlier parts. All processes call it.

    Args:
        group: the processes.
        units: drift of this part in units of 2^-32 nats, int64 `[B, G]`, at least 0.
        nats: the same in nats, float64 `[B, G]`; its gradients go back to earlier parts.

    Returns:
        Both, summed over all earlier parts; the sum of units is limited to the largest drift, as in `drift_sums`.
    """
    all_units, all_nats = group.gather([units, nats])  # [P, B, G]
    total = units.new_zeros(units.shape)
    for earlier in all_units[: group.rank]:
        total = (total + earlier).clamp(max=LARGEST)
    return total, all_nats[: group.rank].sum(0)
