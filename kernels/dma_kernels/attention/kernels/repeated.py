"""A kernel that is launched several times in a row. To find what is compiled takes Triton longer than to launch it."""

from typing import Any


class RepeatedKernel:
    """A kernel whose launches differ only in what compiles nothing anew: pointers, descriptors and `do_not_specialize`.

    Args:
        kernel: a function under `triton.jit`, whose compile-time constants come last.
        constants: these, in their order.
        options: of the launch, such as `num_warps`.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled: Any = None

    def launch(self, programs: int, *arguments: Any) -> None:
        """Launch so many programs along one axis: the others take no more than 65,535."""
        if self._compiled is None:  # the first time, and always under the interpreter
            self._compiled = self._kernel[(programs,)](*arguments, **self._constants, **self._options)
        else:
            self._compiled[(programs, 1, 1)](*arguments, *self._constants.values())
