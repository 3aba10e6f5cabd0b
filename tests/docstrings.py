"""Read docstrings of attributes only once. jsonargparse would parse the source of all classes for each command line."""

import functools

from docstring_parser import attrdoc

_get_attr_docs = attrdoc.AttributeDocstrings.get_attr_docs


@functools.cache
def _docs_of(component: type) -> dict[str, tuple[str, str | None, str | None]]:
    return _get_attr_docs(attrdoc.AttributeDocstrings(), component)


def read_once() -> None:
    """Let all command lines of this process share the docstrings."""
    attrdoc.AttributeDocstrings.get_attr_docs = lambda _, component: _docs_of(component)
