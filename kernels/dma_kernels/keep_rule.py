"""How many keys a query keeps, and of which kind."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class KeepRule:
    """A query keeps its last positions, the best-ranked keys before them, and the first keys of its document.

    Keys compete once they are no longer among the last positions. So a query with enough real keys before it sees
    exactly w + r keys, plus its sinks. It sees fewer if some of its last positions are padding.

    Attributes:
        window: w, the number of best-ranked keys among those at least r positions back.
        last: r, the number of last positions that are kept whatever their rank.
        sinks: s, the number of first keys of each document that are kept whatever their rank.

    Raises:
        ValueError: if a number is not whole or out of range; the message uses its name in configurations.
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
        """Maximum number of keys that a query can see."""
        return self.window + self.last + self.sinks


class HasKeepRule:
    """A base class for objects with a keep rule; it also gives the rule's sizes under their names in configurations.

    Attributes:
        keep: the rule.
    """

    keep: KeepRule

    @property
    def keep_window_size(self) -> int:
        """Best-ranked keys that a query keeps, of those before its last positions."""
        return self.keep.window

    @keep_window_size.setter
    def keep_window_size(self, value: int) -> None:
        self._change(window=value)

    @property
    def keep_last(self) -> int:
        """Last positions that a query keeps, whatever their rank."""
        return self.keep.last

    @keep_last.setter
    def keep_last(self, value: int) -> None:
        self._change(last=value)

    @property
    def sinks(self) -> int:
        """First keys of a document that a query also keeps."""
        return self.keep.sinks

    @sinks.setter
    def sinks(self, value: int) -> None:
        self._change(sinks=value)

    def _change(self, **sizes: int) -> None:
        self.keep = replace(self.keep, **sizes)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise `ValueError` unless a size is a whole number that is at least `least`."""
    if value is None or isinstance(value, float | str | bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
