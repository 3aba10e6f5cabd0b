"""Launches a kernel several times in a row, but looks it up only once.

Triton needs more time to find the compiled kernel for given arguments than to launch it.
"""

from typing import Any


class RepeatedKernel:
    """A kernel whose launches may differ only in pointers, descriptors and arguments that are `do_not_specialize`.

    All of these launches use one compiled kernel.

    Args:
        kernel: a `triton.jit` function whose compile-time constants are its last parameters.
        constants: values of these constants, in the order of the parameters.
        options: options of the launch, such as `num_warps`.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled: Any = None

    def launch(self, programs: int, *arguments: Any) -> None:
        """Launch `programs` programs along the first axis of the grid, as the other axes take at most 65,535."""
        if self._compiled is None:  # at the first launch; under the interpreter, at every launch
            self._compiled = self._kernel[(programs,)](*arguments, **self._constants, **self._options)
        else:
            self._compiled[(programs, 1, 1)](*arguments, *self._constants.values())
