"""One sequence over several processes (context parallelism): each holds consecutive positions, a part of equal length.

A query sees at most w + r + s keys (`KeepRule`), so it needs no more keys from all earlier parts, however long they
are. In one all-gather, each process sends the keys of its own part that a later query may see. From the keys of earlier
parts, it keeps those that its own queries may see. Then it runs the ordinary selection and attention over these keys
and its own.

- `group`: the processes; how sequences are cut into parts; the numbers of documents that cross parts
- `survivors`: which keys of a list a later query may see
- `collectives`: the all-gather and its gradient, a reduce-scatter, as operations that are opaque to torch.compile;
  `traffic`: what they send
- `exchange`: the exchange of one layer's keys; `drift`: how far earlier parts have drifted
"""

from dma_kernels.context.drift import drift_before
from dma_kernels.context.exchange import ExtendedKeys, exchange_keys, exchange_window
from dma_kernels.context.group import ContextGroup, PartPacking
from dma_kernels.context.traffic import Traffic, traffic

__all__ = [
    "ContextGroup",
    "ExtendedKeys",
    "PartPacking",
    "Traffic",
    "drift_before",
    "exchange_keys",
    "exchange_window",
    "traffic",
]
