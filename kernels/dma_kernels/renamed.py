"""Old names of what a package offers: they give what has a new one, and say so once."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def giving_renamed(package: str, **new: Any) -> Callable[[str], Any]:
    """A package's `__getattr__`, by which each old name gives `new[name]`, with one FutureWarning in a process."""

    def attribute(name: str) -> Any:
        if name not in new:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(f"{package}.{name}: {new[name].__name__} is its name now", FutureWarning, stacklevel=2)
        # `from package import name` asks twice.
        return vars(sys.modules[package]).setdefault(name, new[name])

    return attribute


def taking_renamed(**new: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let a function take arguments by their old names, too, with a FutureWarning."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def taking(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
            for old in new:
                if old not in options:
                    continue
                if new[old] in options:
                    raise TypeError(f"{function.__name__}() got {new[old]}, and {old}, its old name")
                warnings.warn(f"{function.__name__}: {old} is called {new[old]} now", FutureWarning, stacklevel=2)
                options[new[old]] = options.pop(old)
            return function(*arguments, **options)

        return taking

    return decorate
