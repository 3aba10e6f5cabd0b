"""Finds the name that a mistyped one was meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'dma'?`, or nothing if no known name is similar."""
    found = closest(given, known)
    return "" if found is None else f"; did you mean {found!r}?"


def closest(given: str, known: Iterable[str]) -> str | None:
    """The known name most similar to the given one, ignoring case; None if none is similar."""
    by_small_letters = {name.lower(): name for name in known}
    found = get_close_matches(given.lower(), by_small_letters, n=1)
    return by_small_letters[found[0]] if found else None
