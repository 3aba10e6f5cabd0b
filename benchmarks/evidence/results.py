"""The result file of a study: a record for each finished cell, added one by one."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.evidence.studies import Cell, Options, Study
from dma_lightning.files.atomic import atomic_write
from dma_lightning.files.reading import read_json

RESULTS = Path(__file__).parents[1] / "results" / "evidence"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished training.

    Attributes:
        task: name in the study; so are size and form.
        options: flags, with variables as they are written in the study, not filled in.
        configs: hash of the contents of the model's and data's configurations.
        model: arguments of the model, including those that the data dictates.
        data: arguments of the data module, without files.
        parameters: number of trainable parameters outside embedding and output head.
        flops_per_token: of forward and backward pass, including attention and output head.
        steps: optimizer steps.
        tokens: positions trained on.
        curves: validation metrics and figures of dynamic masks: steps and values, None for values that are not finite.
        last: last value of each other figure that does not depend on the machine's speed.
        evaluations: results of the evaluations of the checkpoint, by command.
        seconds: how long the processes ran, in all attempts together.
        environment: hardware, versions and commit.
    """

    task: str
    size: str
    form: str
    lr: float
    seed: int
    options: Options
    configs: str
    model: Options
    data: Options
    parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    curves: dict[str, list[tuple[int, float | None]]]
    last: dict[str, float]
    evaluations: dict[str, Any]
    seconds: float
    environment: dict[str, str | int]

    @property
    def cell(self) -> Cell:
        """What was trained."""
        return Cell(self.task, self.size, self.form, self.lr, self.seed)

    def final(self, metric: str) -> float:
        """The final value of a validation metric. NaN if it is not finite."""
        step, value = self.curves[metric][-1]
        return math.nan if value is None or step != self.steps else value


class Invocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one call of the runner achieved.

    Attributes:
        parallel: the largest number of trainings at once.
        seconds: from start to end.
        cells: those that finished during the call.
        whole: whether the call also started these cells and left none unfinished, so that it shows the speed.
        environment: hardware, versions and commit.
        gpus: number of GPUs that the trainings were spread over.
    """

    parallel: int
    seconds: float
    cells: list[str]
    whole: bool
    environment: dict[str, str | int]
    gpus: int = 1


class Results(msgspec.Struct, forbid_unknown_fields=True):
    """The content of the file.

    Attributes:
        records: finished trainings.
        invocations: calls of the runner that have finished at least one training.
        failures: why other cells failed when they were last tried, by the name of the cell.
    """

    records: list[Record] = []
    invocations: list[Invocation] = []
    failures: dict[str, str] = {}

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The content of a file, or empty results if there is no file.

        Raises:
            ValueError: if it is not a file of results.
        """
        return read_json(path, cls, "results of a study") if path.exists() else cls()

    def write(self, path: Path) -> None:
        """Replace the file. Each record gets a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records.sort(key=lambda record: (record.cell, json.dumps(record.options, sort_keys=True)))
        parts = [
            f'"{name}": [\n' + ",\n".join(json.dumps(msgspec.to_builtins(item)) for item in items) + "\n]"
            for name, items in (("records", self.records), ("invocations", self.invocations))
        ]
        parts.append(f'"failures": {json.dumps(self.failures, indent=1, sort_keys=True)}')
        with atomic_write(path) as file:
            file.write(("{" + ",\n".join(parts) + "}\n").encode())

    def of(self, cell: Cell, options: Options, configs: str) -> Record | None:
        """The record of a cell that was trained with these flags and configurations."""
        wanted = (cell, msgspec.to_builtins(options), configs)
        return next((x for x in self.records if (x.cell, x.options, x.configs) == wanted), None)

    def of_study(self, study: Study) -> dict[Cell, Record | None]:
        """The records of all cells of a study that are known so far; None for cells without a record."""
        cells = study.cells(lambda cell, options: self.value_of(study, cell, options))
        return {cell: self.of(cell, options, study.digest_of(cell)) for cell, options in cells.items()}

    def value_of(self, study: Study, cell: Cell, options: Options) -> float | None:
        """The final metric of a cell. None if there is no record."""
        record = self.of(cell, options, study.digest_of(cell))
        return None if record is None else record.final(study.tasks[cell.task].metric)
