"""What a study compares: cells of task, size, form, learning rate and seed. Each is trained by one `fit` command."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from string import Template
from typing import Any, Literal

import msgspec
import yaml

from dma_lightning.files.reading import as_kind

STUDIES = Path(__file__).parent / "studies"
CONFIGS = Path(__file__).parents[2] / "configs"

_ADDED = ("forms", "tasks", "sizes", "options")  # fields that a study merges with its base, name by name

Better = Literal["higher", "lower"]
Options = dict[str, Any]
"""Flags of a command without dashes, and their values; `$name` in text stands for a variable."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a study's file."""


class Form(_Part):
    """One of the things that a study compares, such as a kind of attention.

    Attributes:
        options: flags that define it.
        budget: flags that divide the size's budget of keys per query, each with its share. The shares add up to 1.
        units: for flags that do not count keys but, for example, blocks: how many keys one of them is.
    """

    options: Options = {}
    budget: dict[str, float] = {}
    units: dict[str, int] = {}

    def keys(self, budget: int) -> Options:
        """The flags that divide a budget, with their values.

        Raises:
            ValueError: if a share of the budget is not a whole number.
        """
        shares = {name: _exact(share) * budget / self.units.get(name, 1) for name, share in self.budget.items()}
        if any(share.denominator != 1 for share in shares.values()):
            raise ValueError(f"budget: expected a number of keys that can be shared as {self.budget}, got {budget}")
        return {name: int(share) for name, share in shares.items()}


class Task(_Part):
    """What models are trained on.

    Attributes:
        metric: the logged validation metric that forms are compared by.
        better: whether higher or lower values are better.
        also: further validation metrics to report, and which values are better. They do not choose the learning rate.
        solved: value of the metric at which a training has solved the task.
        configs: files below `configs`, without their extension.
        options: flags.
        evaluations: commands of `dma-lightning` that evaluate the trained checkpoint, with their other arguments.
    """

    metric: str
    better: Better
    also: dict[str, Better] = {}
    solved: float | None = None
    configs: list[str] = []
    options: Options = {}
    evaluations: dict[str, list[str]] = {}

    def __post_init__(self) -> None:
        if self.metric in self.also:
            raise ValueError(f"also: expected other figures than the metric, got {self.metric!r}; leave it out there")

    @property
    def metrics(self) -> dict[str, Better]:
        """All metrics to report, with the one that forms are compared by first."""
        return {self.metric: self.better, **self.also}

    def is_solved(self, value: float) -> bool:
        """Whether a value of the metric is at least as good as `solved`; NaN never is."""
        if self.solved is None:
            return False
        return value >= self.solved if self.better == "higher" else value <= self.solved

    def best(self, values: Mapping[float, float]) -> float:
        """The key with the best value."""
        return (max if self.better == "higher" else min)(values, key=values.__getitem__)


class Size(_Part):
    """How large models are.

    Attributes:
        configs: files below `configs`, without their extension.
        options: flags.
        budget: keys that a query sees in a sparse form.
        forms: extra flags for some forms at this size.
    """

    configs: list[str] = []
    options: Options = {}
    budget: int = 0
    forms: dict[str, Options] = {}


class Grid(_Part):
    """All combinations of some tasks, sizes, forms, learning rates and seeds.

    Attributes:
        best_seeds: further seeds, run only at the learning rate that is best for a form with `seeds`.
        options: flags of this grid only.
    """

    tasks: list[str]
    sizes: list[str]
    forms: list[str]
    lr: list[float]
    seeds: list[int]
    best_seeds: list[int] = []
    options: Options = {}


@dataclass(frozen=True, order=True)
class Cell:
    """One training."""

    task: str
    size: str
    form: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.size} {self.form}, lr {self.lr:g}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where it runs, below the study's folder."""
        return Path(self.task, self.size, self.form, f"lr_{self.lr:g}", f"seed_{self.seed}")


class Study(_Part):
    """A study's file. It may name a `base`: another study, whose forms, tasks, sizes and options it extends.

    Attributes:
        baseline: form that the others are compared with, seed by seed.
        gap: two forms. The report says how much of the gap from the first to the second each other form closes.
        configs: files below `configs`, without their extension, for all cells.
        options: flags of all cells.
    """

    forms: dict[str, Form]
    tasks: dict[str, Task]
    sizes: dict[str, Size]
    grids: list[Grid]
    baseline: str
    gap: tuple[str, str] | None = None
    configs: list[str] = []
    options: Options = {}

    def __post_init__(self) -> None:
        for grid in self.grids:
            for kind in ("tasks", "sizes", "forms"):
                self._check_known("grids", kind, getattr(grid, kind))
            for name in ("tasks", "sizes", "forms", "lr", "seeds"):
                if not getattr(grid, name):
                    raise ValueError(f"grids: expected at least one of {name}, got none")
        for name, size in self.sizes.items():
            self._check_known(f"sizes.{name}.forms", "forms", size.forms)
        for name, form in self.forms.items():
            if form.budget and sum(map(_exact, form.budget.values())) != 1:
                raise ValueError(f"forms.{name}.budget: expected shares that sum up to 1, got {form.budget}")
        if self.baseline not in self.forms:
            raise ValueError(f"baseline: expected one of {sorted(self.forms)}, got {self.baseline!r}")
        if self.gap is not None:
            self._check_known("gap", "forms", self.gap)
            if self.gap[0] == self.gap[1]:
                raise ValueError(f"gap: expected two different forms, got {self.gap[0]!r} twice")

    def _check_known(self, where: str, kind: str, named: Iterable[str]) -> None:
        known = getattr(self, kind)
        if unknown := set(named) - set(known):
            raise ValueError(f"{where}: expected {kind} of {sorted(known)}, got {sorted(unknown)}")

    def cells(self, value_of: Callable[[Cell, Options], float | None]) -> dict[Cell, Options]:
        """All cells known so far, with their flags. Cells of `best_seeds` are known once all rates have been tried.

        Args:
            value_of: the final value of the task's metric for a cell with these flags. NaN if the cell failed, None if
                it has not been tried yet.

        Raises:
            ValueError: if two grids have the same cell with different flags.
        """
        found: dict[Cell, Options] = {}
        for grid in self.grids:
            for cell in self._cells(grid, value_of):
                options = self._options(cell, grid)
                if found.setdefault(cell, options) != options:
                    raise ValueError(
                        f"grids: expected one set of options for {cell}, got two; name another form for one"
                    )
        return found

    def _cells(self, grid: Grid, value_of: Callable[[Cell, Options], float | None]) -> Iterator[Cell]:
        for seed in grid.seeds:  # outermost, so that a deadline cuts off seeds, not forms
            for task, size, lr, form in product(grid.tasks, grid.sizes, grid.lr, grid.forms):
                yield Cell(task, size, form, lr, seed)
        for task, size, form in product(grid.tasks, grid.sizes, grid.forms) if grid.best_seeds else ():
            tried: dict[float, list[float | None]] = {}
            for lr in grid.lr:
                cells = [Cell(task, size, form, lr, seed) for seed in grid.seeds]
                tried[lr] = [value_of(cell, self._options(cell, grid)) for cell in cells]
            best = _best_rate(self.tasks[task], tried)
            for seed in grid.best_seeds if best is not None else ():
                yield Cell(task, size, form, best, seed)

    def _options(self, cell: Cell, grid: Grid) -> Options:
        """Flags of a cell's command. More specific ones win. Variables are not filled in yet."""
        general = (self.options, self.sizes[cell.size].options, self.tasks[cell.task].options)
        own = {"model.lr": cell.lr, "seed_everything": cell.seed}
        return _merged(*general, self.form_options(cell.form, cell.size), grid.options, own)

    def form_options(self, form: str, size: str) -> Options:
        """Flags that define a form at a size.

        Raises:
            ValueError: if the size's budget cannot be divided into the form's shares.
        """
        shared, found = self.sizes[size], self.forms[form]
        return _merged(found.options, found.keys(shared.budget), shared.forms.get(form, {}))

    def fit_arguments(self, cell: Cell, options: Options, variables: Mapping[str, str]) -> list[str]:
        """Arguments of `dma-lightning` that train a cell.

        Raises:
            ValueError: if a variable is missing.
        """
        configs = [f"--config={CONFIGS / name}.yaml" for name in (*self.shape_of(cell), *self.configs)]
        return ["fit", *configs, *flags(options, variables)]

    def digest_of(self, cell: Cell) -> str:
        """Hash of the contents of the model's and data's configs. Records with another hash are not of this cell."""
        contents = [yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in self.shape_of(cell)]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]

    def shape_of(self, cell: Cell) -> list[str]:
        """Configurations of a cell's model and data: files below `configs`, without their extension."""
        return self.sizes[cell.size].configs + self.tasks[cell.task].configs


def read_study(name: str) -> tuple[str, Study]:
    """Read a study: its name and its content.

    Args:
        name: name of a study in this repository, or a path.

    Raises:
        ValueError: if there is no such study, or a field is unknown, missing or wrong.
    """
    path, content = _read(name, Path(), ())
    study: Study = as_kind(content, Study, str(path))
    return path.stem, study


def _read(name: str, folder: Path, above: tuple[Path, ...]) -> tuple[Path, dict[str, Any]]:
    """The path of a study's file, and its content merged with its base. `above` are the files that build on it."""
    own = STUDIES / f"{name}.yaml"
    path = own if own.is_file() else folder / name
    if path.resolve() in above:
        raise ValueError(f"{path}: expected a base that is another study, got one that has this as its base")
    if not path.is_file():
        known = sorted(file.stem for file in STUDIES.glob("*.yaml"))
        raise ValueError(f"study: expected one of {known}, or a file, got {name!r}")
    try:
        content = as_kind(yaml.safe_load(path.read_text()), dict[str, Any], str(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    base = as_kind(content.pop("base", None), str | None, f"{path}: base")
    if base is not None:
        _, before = _read(base, path.parent, (*above, path.resolve()))
        both = {key: [as_kind(x.get(key, {}), Options, f"{path}: {key}") for x in (before, content)] for key in _ADDED}
        content = before | content | {key: old | new for key, (old, new) in both.items()}
    return path, content


def flags(options: Options, variables: Mapping[str, str]) -> list[str]:
    """Flags of a command line, with variables filled in.

    Raises:
        ValueError: if a variable is missing.
    """
    texts = [
        (name, item if isinstance(item, str) else json.dumps(item))
        for name, value in options.items()
        for item in (value if name.endswith("+") and isinstance(value, list) else [value])
    ]
    return [f"--{name}={filled(text, variables)}" for name, text in texts]


def filled(text: str, variables: Mapping[str, str]) -> str:
    """Text with variables filled in.

    Raises:
        ValueError: if a variable is missing.
    """
    try:
        return Template(text).substitute(variables)
    except KeyError as error:
        name = error.args[0]
        raise ValueError(f"{text}: expected a value of ${name}, got none; give it by --set {name}=...") from error


def _merged(*parts: Options) -> Options:
    """All flags merged. Later values win, except that lists of flags that end with `+` are joined."""
    merged: Options = {}
    for part in parts:
        for name, value in part.items():
            joins = name.endswith("+") and isinstance(value, list) and isinstance(merged.get(name), list)
            merged[name] = [*merged[name], *value] if joins else value
    return merged


def _exact(share: float) -> Fraction:
    """The number exactly as it was written, such as one tenth."""
    return Fraction(str(share))


def _best_rate(task: Task, tried: Mapping[float, list[float | None]]) -> float | None:
    """The rate with the best mean. None as long as some have not been tried, or if all failed."""
    means = {}
    for rate, values in tried.items():
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        mean = sum(known) / len(known)
        if mean == mean:  # not NaN
            means[rate] = mean
    return task.best(means) if means else None
