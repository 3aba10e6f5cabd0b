"""Configs that come with the package: `-c tiny` finds `configs/model/tiny.yaml`, with or without a clone."""

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from dma_lightning.closest import closest

_PACKAGE = Path(__file__).parents[1]
_MOST = 3  # names that a message lists


@cache
def shipped_configs() -> dict[str, Path]:
    """Config files of the clone or of the installed package, by names such as `model/tiny`."""
    folders = [_PACKAGE / "configs", _PACKAGE.parent / "configs"]
    folder = next(x for x in folders if x.is_dir())
    return {str(x.relative_to(folder).with_suffix("").as_posix()): x for x in sorted(folder.glob("*/*.yaml"))}


def find_config(given: str) -> str:
    """Path of the shipped config with a name; the name itself if it is a file, or does not name exactly one config.

    Args:
        given: `tiny`, `model/tiny` or `configs/model/tiny.yaml`. Anything else is returned unchanged.
    """
    found = _named(given)
    if len(found) != 1 or (Path(given).exists() and not Path(given).is_dir()):
        return given
    return str(shipped_configs()[found[0]])


def what_was_meant(given: str, beside: Iterable[str] = ()) -> str:
    """The end of a message about a name that no config or several configs have: the nearest names, or else all.

    Args:
        given: the name.
        beside: files in the folder of the name; the user may have meant one of them.
    """
    near = _named(given) or [x for x in [closest(given, beside)] if x is not None] or _nearest(given)
    return f"; did you mean {_listed(near)}?" if near else f"; the shipped configs are {', '.join(shipped_configs())}"


def _nearest(given: str) -> list[str]:
    """The shipped configs with the names most similar to a given one."""
    names = {name: [name] for name in shipped_configs()}
    for name in shipped_configs():
        names.setdefault(name.partition("/")[2], []).append(name)
    found = get_close_matches(given.removesuffix(".yaml").lower(), names, n=_MOST)
    return list(dict.fromkeys(name for key in found for name in names[key]))[:_MOST]


def _named(given: str) -> list[str]:
    """The shipped configs with a name."""
    return [x for x in shipped_configs() if given in (x, x.partition("/")[2], f"configs/{x}.yaml")]


def _listed(names: list[str]) -> str:
    quoted = [repr(x) for x in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
