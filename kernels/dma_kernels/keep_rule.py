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
        for name, value in (("keep_window_size", self.window), ("keep_last", self.last), ("sinks", self.sinks)):
            check_whole(name, value)
        if self.window < 1 or self.last < 0 or self.sinks < 0:
            raise ValueError(
                "expected keep_window_size >= 1, keep_last >= 0 and sinks >= 0, "
                f"got {self.window}, {self.last} and {self.sinks}"
            )

    @property
    def capacity(self) -> int:
        """The most keys that a query can see."""
        return self.window + self.last + self.sinks


def check_whole(name: str, value: int) -> None:
    """Raise `ValueError` for a number with a fraction, which a computation of sizes leads to."""
    if isinstance(value, float):
        raise ValueError(f"{name}: expected a whole number, got {value}")
