"""Reading configurations and flags, for all our commands.

jsonargparse parses every value as YAML before it looks at the option's type. Here, our own string options keep their
characters as they are. Lightning's own options and configuration files stay YAML, in which only an empty value or
`null` means None.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import isclass, isfunction, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)

# jsonargparse has no public names for these. tests/lightning/cli/test_strings.py tests what they are used for.
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg
from lightning.pytorch.cli import LightningArgumentParser

from dma_lightning.cli.errors import PACKAGES
from dma_lightning.cli.shipped_configs import find_config
from dma_lightning.cli.usage import BriefParser

_load_yaml = get_loader("yaml")
_NULL = "tag:yaml.org,2002:null"
_SPECIFICATION = ("class_path", "init_args", "dict_kwargs")  # jsonargparse's own keys of an object


class _Characters(str):
    """A flag's value on its way to the parser of a class; jsonargparse would parse a plain string as YAML."""

    __slots__ = ()


class _Option(ActionTypeHint):
    """An option of a parser.

    Attributes:
        of_text: whether it is our own option for a string or path.
        of_texts: whether it is our own option for a list of strings; each flag adds one.
        of_weights: whether it is our own option for a string, or for strings with weights in braces.
    """

    of_text = of_texts = of_weights = False

    def mark_as_ours(self) -> None:
        """Keep strings as they are if the option takes strings."""
        is_union = get_origin(self._typehint) in (Union, UnionType)
        kinds = {*(get_args(self._typehint) if is_union else [self._typehint])} - {NoneType}
        self.of_weights = kinds == {str, dict[str, float]}
        self.of_text, self.of_texts = kinds in ({str}, {Path}), kinds == {list[str]}

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if self.of_texts and option:
            option = option.removesuffix("+") + "+"  # "+" makes jsonargparse append to the list
        super().__call__(parser, namespace, value, option)

    # jsonargparse requires these parameter names.
    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: str | None = None) -> Any:
        if isinstance(value, NestedArg) and isinstance(value.val, str) and self._is_argument_of_class(value.key):
            value = NestedArg(value.key, _Characters(value.val))  # the parser of the class knows the type
        elif isinstance(value, str) and self.of_text:
            return Path(value) if Path in (self._typehint, *get_args(self._typehint)) else value
        elif isinstance(value, str) and self.of_weights:
            value = _weights(value)
            if isinstance(value, str):
                return value
        elif isinstance(value, str) and self.of_texts:
            value = [value]
        return super()._check_type(value, append, cfg, mode)

    def _is_argument_of_class(self, name: str) -> bool:
        takes_objects = self.is_subclass_typehint(self, all_subtypes=False, also_lists=True, also_closed=True)
        return takes_objects and name.partition(".")[0] not in _SPECIFICATION


class _ConfigFile(ActionConfigFile):
    """The option `-c`, which also takes names of shipped configs."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, find_config(values), option_string)


class Parser(BriefParser, LightningArgumentParser):
    """A parser that keeps values of our functions' and classes' string options as they are."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            help_text = "A YAML file of options, or the name of a config that comes with the package, such as tiny."
            kwargs |= {"action": _ConfigFile, "help": help_text}
        return super().add_argument(*args, **kwargs)

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> list[str]:
        return self._mind_types(class_type, super().add_class_arguments(class_type, *args, **kwargs))

    def add_subclass_arguments(self, baseclass: Any, nested_key: str, *args: Any, **kwargs: Any) -> None:
        super().add_subclass_arguments(baseclass, nested_key, *args, **kwargs)
        self._mind_types(baseclass, [nested_key])

    def add_function_arguments(self, function: Callable, *args: Any, **kwargs: Any) -> list[str]:
        return self._mind_types(function, super().add_function_arguments(function, *args, **kwargs))

    def add_objects(self, kinds: Mapping[str, type], title: str) -> None:
        """Add an option for an object of each class; the object is created with defaults unless the option is null."""
        group = self.add_argument_group(title)
        self.objects = {**self.objects, **kinds}
        for name, kind in kinds.items():
            about = (kind.__doc__ or "").strip().partition("\n")[0]
            group.add_argument(f"--{name}", type=kind | None, default={}, help=about)
            self._mind_types(kind, [name])

    def parse_object(self, obj: Any, *args: Any, **kwargs: Any) -> Namespace:
        for name, value in obj.items():
            if isinstance(value, _Characters):
                obj[name] = str(value)
        return super().parse_object(obj, *args, **kwargs)

    def add_shown(self, name: str, parser: ArgumentParser) -> None:
        """Show another subcommand in the help."""
        assert self._subcommands_action is not None
        self._subcommands_action.add_subcommand(name, parser, help=parser.description)

    def _mind_types(self, source: Any, added: list[str]) -> list[str]:
        """Read options according to their types; `source` is the class or function that takes them."""
        for action in self._actions:
            if type(action) is ActionTypeHint and action.dest in added:
                action.__class__ = _Option
                assert isinstance(action, _Option)
                if _is_ours(source, action.dest.rpartition(".")[2]):
                    action.mark_as_ours()
        return added


def set_up_parsing(completion: bool = False) -> None:
    """Use attribute docstrings as help, and never create an object from an untyped value.

    Args:
        completion: whether new parsers have `--print_completion`.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        instantiate_subclass_spec_in_any=False,
        add_print_completion_argument=completion,
    )
    set_loader("yaml", _load, exceptions=(yaml.YAMLError,))
    loader = get_yaml_default_loader()
    resolvers: dict[Any, list[tuple[str, Any]]] = loader.yaml_implicit_resolvers
    others = {first: [known for known in found if known[0] != _NULL] for first, found in resolvers.items()}
    loader.yaml_implicit_resolvers = others
    loader.add_implicit_resolver(_NULL, re.compile("^(?:null|)$"), ["n", ""])  # not ~, the home folder, nor Null


def _load(text: str) -> Any:
    """Parse YAML, but keep a flag that is only a comment, such as `#notes.txt`, as text."""
    value = _load_yaml(text)
    return text if value is None and text.strip() else value


def _weights(text: str) -> str | dict[str, float]:
    """A mapping from names to numbers in braces, as YAML; any other text as it is."""
    if text.startswith("{") and text.endswith("}"):
        with suppress(yaml.YAMLError, AttributeError, TypeError, ValueError):
            weights = yaml.load(text, yaml.BaseLoader)  # which reads all values as text
            return {str(name): float(weight) for name, weight in weights.items()}
    return text


def _is_ours(source: Any, name: str) -> bool:
    """Whether our own code declares a parameter of a class or function, rather than Lightning's."""
    inits = {base: vars(base).get("__init__") for base in source.__mro__} if isclass(source) else {source: source}
    declares = (owner for owner, init in inits.items() if isfunction(init) and name in signature(init).parameters)
    owner = next(declares, source)  # else it is passed on through **kwargs
    return getattr(owner, "__module__", "").partition(".")[0] in PACKAGES
