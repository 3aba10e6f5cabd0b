"""What the terms of the retention loss are computed from.

B batch, H query heads, G KV heads, N length, M sampled queries, D head dim.
"""

from typing import NamedTuple

from torch import Tensor

NO_RUN = -1  # document number of a key that no query sees
NO_QUERY = -2  # document number of a query that sees nothing; it differs from `NO_RUN`, so the two do not match


class TermInputs(NamedTuple):
    """Sampled queries, and all keys.

    Attributes:
        q: the sampled queries, `[B, H, M, D]`.
        k: keys, `[B, G, N, D]`.
        values: `[B, G, N, D]` if the target is the effect on the output: attention times the distance of a value from
            the mean value of all keys that the query sees, divided by its sum. None if it is the attention.
        content: each key's rank without its drift, in nats, float32 or float64 `[B, G, N]`.
        drift: sum of the decays up to each key, in nats, `[B, G, N]`; None for none.
        positions: positions of the queries, int64 `[M]`.
        runs: number of each key's document, int32 `[2, B or 1, N]`: first for keys that queries see, then for keys that
            can be far; `NO_RUN` for all other keys. None if all keys are in one document.
        distance: number of positions from which on keys are far.
    """

    q: Tensor
    k: Tensor
    values: Tensor | None
    content: Tensor
    drift: Tensor | None
    positions: Tensor
    runs: Tensor | None
    distance: int
