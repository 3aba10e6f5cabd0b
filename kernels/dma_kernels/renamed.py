"""Old names, which keep working: they warn once, and give the object that has a new name."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def giving_renamed(package: str, **new: Any) -> Callable[[str], Any]:
    """A package's `__getattr__`: each old name gives `new[name]`, with one FutureWarning per process."""

    def attribute(name: str) -> Any:
        if name not in new:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(f"{package}.{name} is called {new[name].__name__} now", FutureWarning, stacklevel=2)
        # Kept, since `from package import name` looks the name up twice.
        return vars(sys.modules[package]).setdefault(name, new[name])

    return attribute


def taking_renamed(**new: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let a function also take arguments by their old names, with a FutureWarning."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def taking(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
            for old in new:
                if old not in options:
                    continue
                if new[old] in options:
                    raise TypeError(f"{function.__name__}() got both {new[old]} and its old name, {old}; give only one")
                warnings.warn(f"{function.__name__}: {old} is called {new[old]} now", FutureWarning, stacklevel=2)
                options[new[old]] = options.pop(old)
            return function(*arguments, **options)

        return taking

    return decorate
