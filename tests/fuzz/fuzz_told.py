"""Every failure says with which seed and which drawn case it came."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told(seed: int, case: object) -> Iterator[None]:
    """Turn any exception into an `AssertionError` that names seed and case."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"seed {seed}, {case}: {type(error).__name__}: {error}") from error
