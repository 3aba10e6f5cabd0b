"""Every failure names its seed and the drawn case."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told(seed: int, case: object) -> Iterator[None]:
    """Turn any exception into an `AssertionError` that names the seed and the case."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"seed {seed}, {case}: {type(error).__name__}: {error}") from error
