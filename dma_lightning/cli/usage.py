"""One-line messages about mistakes on a command line: what the user gave and where, and what was expected or meant.

jsonargparse prints all options of a command before its message, and for a value with several possible types, the error
of each type. A `BriefParser` prints only what the user needs, and ends with status 2.
"""

import ast
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from dma_lightning.cli.errors import CLASS_PROBLEM, shortened, shows_traceback
from dma_lightning.cli.shipped_configs import find_config, what_was_meant
from dma_lightning.closest import closest, did_you_mean
from dma_lightning.data import SequenceDataModule

# Options that take the name of a class, and its base class.
_CLASSES: dict[str, type] = {
    "data": SequenceDataModule,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "trainer.profiler": Profiler,
    "trainer.strategy": Strategy,
}
_KEY = re.compile(r'^Parser key "([^"]+)":\s*(.*)', re.DOTALL)
_UNKNOWN_KEY = re.compile(r"^(?:Subcommand '\w+' does not|Group '([\w.]+)' does not|Option)(?: accept option)? '(\S+)'")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_MISSING = "the following arguments are required: "
_UNRECOGNIZED = "unrecognized arguments: "


class BriefParser(ArgumentParser):
    """Reports mistakes in one line.

    Attributes:
        objects: classes of objects whose arguments are options, by the prefix of these options.
    """

    objects: Mapping[str, type] = {}  # never changed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2; without `exit_on_error`, raise jsonargparse's error."""
        if not self.exit_on_error:
            super().error(message, ex)
        if shows_traceback():
            raise ArgumentError(None, message) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        if of_command := re.match(rf"{_MISSING}(\w+)\.", message):
            prog += f" {of_command[1]}"
        told = shortened(explained(message, parser))
        self.exit(2, f"{prog}: {told}{' See' if told.endswith('?') else '; see'} `{prog} --help`\n")


def explained(message: str, parser: ArgumentParser) -> str:
    """Rewrite a message of jsonargparse for users."""
    if message.startswith(_UNRECOGNIZED):
        return _unrecognized(message.removeprefix(_UNRECOGNIZED).split(), parser)
    if message.startswith(_MISSING):
        return _missing(message.removeprefix(_MISSING), parser)
    if message.startswith("Problems parsing config"):
        return _no_yaml(message, parser)
    if found := _KEY.match(message):
        return _wrong_value(found[1], found[2], parser)
    if found := _UNKNOWN_KEY.match(message):
        return _unknown_key(".".join(x for x in found.groups() if x), parser)
    return message


def _unrecognized(given: list[str], parser: ArgumentParser) -> str:
    """Message for arguments that no option takes."""
    option = given[0].partition("=")[0]
    if option.startswith("-"):
        return f"{option}: no such option{_meant(option, _options(parser))}"
    args = _arguments(parser)
    before = args[: args.index(option)] if option in args else []
    flag = next((x for x in reversed(before) if x.startswith("-")), "")
    shown = f"{given[0]}{f' and {len(given) - 1} more' if len(given) > 1 else ''}"
    first = Path(given[0])
    alike = [x for x in map(Path, [*before[-1:], *given]) if (x.parent, x.suffix) == (first.parent, first.suffix)]
    if len(alike) < 2 or not all(x.exists() for x in alike):
        return f"{shown}: expected nothing here; options start with --"
    pattern = f"'{first.parent / f'*{first.suffix}'}'"
    return (
        f"{shown}: expected one value{f' for {flag}' if flag else ''}, got several; the shell replaces a pattern by "
        f"the files that it matches, so quote it, as in {f'{flag} {pattern}' if flag else pattern}"
    )


def _missing(names: str, parser: ArgumentParser) -> str:
    """Message for missing arguments."""
    parts = [name.strip().rpartition(".")[2] for name in names.split(",")]
    if parts == ["data"]:
        return f"data: expected a class of data, got none; {_how_to_give_data(_arguments(parser))}"
    known = set(_options(parser))
    shown = ", ".join(f"--{name}" if f"--{name}" in known else name for name in parts)
    return f"{shown}: must be given"


def _how_to_give_data(args: list[str]) -> str:
    """What to type if only the data class is missing, the one option without a default."""
    if args == ["fit"]:
        return (
            "`dma-lightning fit -c tiny -c pydoc -c cpu` trains a small model on a CPU in minutes, and `dma-lightning "
            "init FOLDER` writes a config to start from"
        )
    if len(args) == 1:
        return f"`dma-lightning {args[0]} --ckpt_path FILE` uses the data of a checkpoint"
    return "give a config such as -c data/text, or --data TextDataModule"


def _no_yaml(message: str, parser: ArgumentParser) -> str:
    """Message for a config that is not YAML."""
    for name in _configs(_arguments(parser)):
        try:
            yaml.safe_load(Path(name).read_text())
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f", line {mark.line + 1}"
            return f"{name}{line}: expected YAML, got something else: {getattr(error, 'problem', None) or error}"
    return message


def _unknown_key(key: str, parser: ArgumentParser) -> str:
    """Message for a key of a config that is not an option."""
    known = (option.lstrip("-") for option in _options(parser))
    return f"{_where(key, key.rpartition('.')[2], parser)}: no such option{_meant(key, known)}"


def _wrong_value(key: str, reason: str, parser: ArgumentParser) -> str:
    """Message for a value that an option does not accept; `reason` is jsonargparse's, with all types that it tried."""
    if found := re.search(r"File does not exist: '([^']+)'", reason):
        return _no_file(key, Path(found[1]))
    if found := CLASS_PROBLEM.search(reason):
        return _class_problem(key, found[1], found[2].strip(), parser)
    if (found := _NO_CLASS.search(reason)) and (key in _CLASSES or "list[" in reason):
        return f"{_where(key, found[1], parser)}: no such class: {found[1]}{_meant(found[1], _class_names(key))}"
    value = re.search(r"Got value: (.*)|Given value: (.*)", reason, re.DOTALL)
    types = re.search(r"Expected an? (.+?)\. Got value|Subtypes: \[(.*)\]\n", reason)
    if mapping := re.search(r"Subtypes: \[(.*dict\[.*)\]\n.*Got value: (\S+).*Given value: (.*)", reason, re.DOTALL):
        return f"{_where(key, mapping[2], parser)}: expected {_type_names(mapping[1])}, got {mapping[3]}"
    if value is None or types is None:
        return f"{_where(key, '', parser)}: {reason}"
    given = (value[1] or value[2] or "").strip()
    expected = types[1] or types[2]
    choices = [str(x) for x in _choices(expected)]
    meant = did_you_mean(given, choices)
    return f"{_where(key, given, parser)}: expected {_type_names(expected)}, got {given!r}{meant}"


def _no_file(key: str, path: Path) -> str:
    """Message for a missing file."""
    beside = [_short(x) for x in path.parent.iterdir()] if path.parent.is_dir() else []
    if key == "config":
        meant = what_was_meant(_short(path), beside)
        return f"-c: expected a file or the name of a shipped config, got {_short(path)!r}{meant}"
    return f"--{key}: expected a file, got {_short(path)!r}, which does not exist{did_you_mean(_short(path), beside)}"


def _class_problem(key: str, name: str, reason: str, parser: ArgumentParser) -> str:
    """Message for a missing class, or one of its arguments."""
    if found := re.match(r"Option '([^']+)' is not accepted", reason):
        kind: Any = locate(name)
        known = ArgumentParser().add_class_arguments(kind, fail_untyped=False) if isinstance(kind, type) else []
        where = _where(f"{key}.{found[1]}", found[1], parser)
        return f"{where}: {name.rpartition('.')[2]} has no such argument{_meant(found[1], known)}"
    if found := _KEY.match(reason):
        return _wrong_value(f"{key}.{found[1]}", found[2], parser)
    where, last = _where(key, name, parser), name.rpartition(".")[2]
    if "has no attribute" in reason:
        return f"{where}: no such class: {name}{_meant(last, _class_names(key))}"
    if "No module named" in reason:
        known = last if last in _class_names(key) else None
        return f"{where}: {reason}, the module of {name}{'' if known is None else f'; did you mean {known}?'}"
    return f"{where}: {name}: {reason}"


def _meant(given: str, known: Iterable[str]) -> str:
    """Like `did_you_mean`, but also matches the last part of a longer name: `batch_size` finds `data.batch_size`."""
    known = list(known)
    whole = [x for x in known if x.lstrip("-").rpartition(".")[2] == given.lstrip("-")]
    found = whole[0] if whole else closest(given, known)
    return "" if found is None else f"; did you mean {found}?"


def _options(parser: ArgumentParser) -> Iterator[str]:
    """All options of a parser, of its objects, and of all data modules."""
    found = dict.fromkeys(re.findall(r"(?<![\w.-])--?[\w.-]+", parser.format_usage()))
    yield from found
    objects = list(getattr(parser, "objects", {}).items())
    if "--data" in found:
        objects += [("data", data) for data in _subclasses(SequenceDataModule)]
    for name, kind in objects:
        yield from (f"--{name}.{x}" for x in ArgumentParser().add_class_arguments(kind, fail_untyped=False))


def _class_names(key: str) -> list[str]:
    """Names of the classes that an option accepts."""
    base = _CLASSES.get(key)
    return [] if base is None else [x.__name__ for x in _subclasses(base)]


def _subclasses(base: type) -> Iterator[type]:
    kind: type
    for kind in base.__subclasses__():
        if not kind.__name__.startswith("_"):
            yield kind
        yield from _subclasses(kind)


def _where(key: str, word: str, parser: ArgumentParser) -> str:
    """The flag or file that set a key; if several did, the last that contains `word`."""
    args, root = _arguments(parser), key.split(".")[0]
    givers = []
    for name in _configs(args):
        text = Path(name).read_text(errors="replace") if Path(name).is_file() else ""
        if re.search(rf"^{re.escape(root)}\s*:", text, re.MULTILINE):
            givers.append((f"{name}: {key}", text))
    for number, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        flag = flag.rstrip("+").replace(".init_args.", ".")
        if flag == f"--{key}" or f"--{key}".startswith(f"{flag}.") or flag.startswith(f"--{key}."):
            givers.append((f"--{key}", f"{flag} {value or ' '.join(args[number + 1 : number + 2])}"))
    saying = [place for place, text in givers if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    return [key, *(place for place, _ in givers), *saying][-1]


def _short(path: Path) -> str:
    """A path, relative to the working folder if it is below it."""
    folder = Path.cwd()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _configs(args: list[str]) -> list[str]:
    """The config files on a command line."""
    pairs = zip(["", *args], args, strict=False)
    names = [arg for before, arg in pairs if before in ("-c", "--config")]
    names += [arg.partition("=")[2] for arg in args if arg.startswith(("-c=", "--config="))]
    return [_short(Path(find_config(name))) for name in names]


def _arguments(parser: ArgumentParser) -> list[str]:
    """The arguments that the parser was given."""
    return list(getattr(parser, "args", None) or [])


def _choices(types: str) -> list[Any]:
    """The values of all `Literal` types in a description of types."""
    return [x for found in re.findall(r"Literal(\[[^\]]*\])", types) for x in ast.literal_eval(found)]


def _type_names(types: str) -> str:
    """Types in words: `one of 'wsd', 'cosine'`, `int, float or null`."""
    plain = re.sub(r"(?:typing\.)?Literal\[[^\]]*\](?:, )?", "", types)
    names = re.findall(r"<class '(?:[\w.]+\.)?(\w+)'>|(dict\[.*?\])", plain)
    names = [kind or mapping for kind, mapping in names] or [x for x in [plain.strip(" ,")] if x]
    names = ["null" if name == "NoneType" else name for name in names]
    choices = ", ".join(map(repr, dict.fromkeys(_choices(types))))
    parts = ([f"one of {choices}"] if choices else []) + list(dict.fromkeys(names))
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
