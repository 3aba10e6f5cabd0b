"""How many keys a query keeps, and of which kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KeepRule:
    """A query keeps the best-ranked keys of its past, and besides these its last positions and its document's first.

    Attributes:
        window: w, best-ranked keys.
        last: r, last positions, whatever their rank.
        sinks: s, first keys of each document, whatever their rank.

    Raises:
        ValueError: if a number is no whole one or out of range; it is called by the name that configurations give it.
    """

    window: int
    last: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        check_at_least("keep_window_size", self.window, 1)
        check_at_least("keep_last", self.last, 0)
        check_at_least("sinks", self.sinks, 0)

    @property
    def capacity(self) -> int:
        """The most keys that a query can see."""
        return self.window + self.last + self.sinks


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise `ValueError` unless a size is a whole number of at least so much."""
    if isinstance(value, float):
        raise ValueError(f"{name}: expected a whole number, got {value}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
