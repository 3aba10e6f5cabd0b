"""How all our commands read configurations and flags.

jsonargparse reads every value as YAML before it looks at the type of its option. Here, a string option of ours means
its characters, whatever YAML takes them for. Lightning's own options and configuration files stay YAML, in which only
an empty value or `null` is nothing.
"""

import re
from collections.abc import Callable, Mapping
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

# jsonargparse has no public name for these. tests/lightning/cli/test_strings.py holds what they are used for.
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg
from lightning.pytorch.cli import LightningArgumentParser

from dma_lightning.cli.errors import PACKAGES
from dma_lightning.cli.shipped_configs import find_config
from dma_lightning.cli.usage import BriefParser

_load_yaml = get_loader("yaml")
_NULL = "tag:yaml.org,2002:null"
_SPECIFICATION = ("class_path", "init_args", "dict_kwargs")  # what jsonargparse names itself of an object


class _Characters(str):
    """A flag on its way to the parser of a class; jsonargparse would ask YAML about a plain string."""

    __slots__ = ()


class _Option(ActionTypeHint):
    """An option of a parser.

    Attributes:
        of_text: whether it is one of ours for a string or a path.
        of_texts: whether it is one of ours for a list of strings; each flag adds one.
    """

    of_text = of_texts = False

    def mark_as_ours(self) -> None:
        """Let strings be their characters, if the option takes any."""
        is_union = get_origin(self._typehint) in (Union, UnionType)
        kinds = {*(get_args(self._typehint) if is_union else [self._typehint])} - {NoneType}
        self.of_text, self.of_texts = kinds in ({str}, {Path}), kinds == {list[str]}

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if self.of_texts and option:
            option = option.removesuffix("+") + "+"  # with which jsonargparse adds to a list
        super().__call__(parser, namespace, value, option)

    # jsonargparse looks for these names.
    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: str | None = None) -> Any:
        if isinstance(value, NestedArg) and isinstance(value.val, str) and self._is_argument_of_class(value.key):
            value = NestedArg(value.key, _Characters(value.val))  # the parser of the class knows the type
        elif isinstance(value, str) and self.of_text:
            return Path(value) if Path in (self._typehint, *get_args(self._typehint)) else value
        elif isinstance(value, str) and self.of_texts:
            value = [value]
        return super()._check_type(value, append, cfg, mode)

    def _is_argument_of_class(self, name: str) -> bool:
        takes_objects = self.is_subclass_typehint(self, all_subtypes=False, also_lists=True, also_closed=True)
        return takes_objects and name.partition(".")[0] not in _SPECIFICATION


class _ConfigFile(ActionConfigFile):
    """The option `-c`, which also takes the name of a shipped config."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, find_config(values), option_string)


class Parser(BriefParser, LightningArgumentParser):
    """A parser in which string options of our functions and classes mean their characters."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            help_text = "File of options in YAML, or the name of a config that comes with the package, such as tiny."
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
        """Add an option for an object of each class, which is made of its defaults unless the option is null."""
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
        """Show another subcommand among those that there are."""
        assert self._subcommands_action is not None
        self._subcommands_action.add_subcommand(name, parser, help=parser.description)

    def _mind_types(self, source: Any, added: list[str]) -> list[str]:
        """Let options be read by their types; `source` is the class or function that takes them."""
        for action in self._actions:
            if type(action) is ActionTypeHint and action.dest in added:
                action.__class__ = _Option
                assert isinstance(action, _Option)
                if _is_ours(source, action.dest.rpartition(".")[2]):
                    action.mark_as_ours()
        return added


def set_up_parsing(completion: bool = False) -> None:
    """Let attribute docstrings be help, and let no untyped value make an object.

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
    loader.add_implicit_resolver(_NULL, re.compile("^(?:null|)$"), ["n", ""])  # neither ~, which is a folder, nor Null


def _load(text: str) -> Any:
    """What YAML says; a flag of a comment alone, such as `#notes.txt`, is text."""
    value = _load_yaml(text)
    return text if value is None and text.strip() else value


def _is_ours(source: Any, name: str) -> bool:
    """Whether a parameter of a class or function is declared by code of ours, and not inherited from Lightning."""
    inits = {base: vars(base).get("__init__") for base in source.__mro__} if isclass(source) else {source: source}
    declares = (owner for owner, init in inits.items() if isfunction(init) and name in signature(init).parameters)
    owner = next(declares, source)  # else it is one of those that **kwargs pass on
    return getattr(owner, "__module__", "").partition(".")[0] in PACKAGES
