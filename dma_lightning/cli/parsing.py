"""How all our commands read configurations and flags."""

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings

_load_yaml = get_loader("yaml")


def set_up_parsing() -> None:
    """Let attribute docstrings be help, let flags mean their characters, and let no untyped value make an object."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True, instantiate_subclass_spec_in_any=False)
    set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


def _load(text: str) -> Any:
    """What a file or a flag says; a flag such as `#notes.txt` or `~` is text, although YAML takes it for nothing."""
    value = _load_yaml(text)
    is_file = text.endswith("\n")
    return text if value is None and text.strip() and not is_file else value
