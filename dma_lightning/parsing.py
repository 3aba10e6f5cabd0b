"""How all our commands read configurations and flags."""

from jsonargparse import set_parsing_settings


def set_up_parsing() -> None:
    """Let attribute docstrings be help, and let no value without a type make an object of any class."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True, instantiate_subclass_spec_in_any=False)
