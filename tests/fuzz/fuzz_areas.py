"""All checks, by the name of their area. A check takes a seed. If it fails, its `AssertionError` describes the case."""

from collections.abc import Callable
from dataclasses import dataclass

from fuzz_backends import check_backends, check_flex, check_triton
from fuzz_caches import check_key_caches, check_mixers, check_triton_caches
from fuzz_checkpoints import check_bytes, check_commands, check_resuming, check_values
from fuzz_drift import check_drift, check_drift_caches, check_drift_triton_caches
from fuzz_exports import check_exports
from fuzz_gates import check_gates
from fuzz_masks import check_intervals, check_masks
from fuzz_prepared import check_prepared, check_preparing, check_text, check_tokenizers
from fuzz_races import check_races
from fuzz_retention import check_retention, check_retention_triton
from fuzz_selection import check_selection


@dataclass(frozen=True)
class Area:
    """A kind of case.

    Attributes:
        check: runs the case of one seed.
        share: how many cases run for every thousand requested, since some take seconds.
    """

    check: Callable[[int], None]
    share: int = 1000


AREAS = {
    "selection": Area(check_selection),
    "drift": Area(check_drift),
    "masks": Area(check_masks),
    "intervals": Area(check_intervals),
    "backends": Area(check_backends),
    "gates": Area(check_gates),
    "retention": Area(check_retention),
    "retention_triton": Area(check_retention_triton, 20),
    "triton": Area(check_triton, 20),
    "triton_caches": Area(check_triton_caches, 20),
    "flex": Area(check_flex, 2),
    "drift_triton_caches": Area(check_drift_triton_caches, 20),
    "key_caches": Area(check_key_caches),
    "drift_caches": Area(check_drift_caches),
    "mixers": Area(check_mixers),
    "prepared": Area(check_prepared),
    "preparing": Area(check_preparing, 200),
    "text": Area(check_text),
    "tokenizers": Area(check_tokenizers),
    "exports": Area(check_exports),
    "checkpoint_bytes": Area(check_bytes),
    "checkpoint_values": Area(check_values, 200),
    "resuming": Area(check_resuming, 100),
    "commands": Area(check_commands, 20),
    "races": Area(check_races, 20),
}
