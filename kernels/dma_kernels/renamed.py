"""Old names of what a package offers: they give what has a new one, and say so."""

import sys
import warnings
from collections.abc import Callable
from typing import Any


def giving_renamed(package: str, **new: Any) -> Callable[[str], Any]:
    """A package's `__getattr__`, by which each old name gives `new[name]`, with one FutureWarning in a process."""

    def attribute(name: str) -> Any:
        if name not in new:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(f"{package}.{name}: {new[name].__name__} is its name now", FutureWarning, stacklevel=2)
        # `from package import name` asks twice.
        return vars(sys.modules[package]).setdefault(name, new[name])

    return attribute
