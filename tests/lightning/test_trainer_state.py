"""Lightning's private names: each does what we expect, and none is used outside `trainer_state`."""

import ast
import inspect
import pkgutil
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

import dma_lightning
from dma_lightning import trainer_state
from dma_lightning.cli import parsing
from dma_lightning.trainer_state import (
    ADDED_HPARAMS,
    CLASS_PATH,
    OVERRIDDEN,
    accumulates,
    given_version,
    has_trainer,
    is_last_step,
    is_logging_step,
    is_of_logging_step,
    is_of_restoring,
    let_clip_gradients,
    log_into_version,
    logged_step,
    random_states,
    saved_device,
    set_initial_hparams,
    set_logged_step,
    set_random_states,
    validates_next,
    write_logs,
)


class Line(pl.LightningModule):
    """Trains one weight, and logs the number of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("batch", float(batch_idx))
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/weight", self.layer.weight.sum())

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.1)


class Written(Logger):
    """Records what is written, with its step."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any) -> None:
        """Nothing."""


def fit(
    *callbacks: pl.Callback,
    batches: int = 6,
    model: pl.LightningModule | None = None,
    ckpt_path: Any = None,
    **more: Any,
) -> None:
    """Train on the CPU, without files and output."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **quiet | {"max_epochs": 1} | more
    )
    data = DataLoader(torch.ones(batches, 1))
    trainer.fit(model or Line(), data, DataLoader(torch.ones(1, 1)), ckpt_path=ckpt_path)


def stop_at_the_end(trainer: pl.Trainer, *_: object) -> None:
    """Stop as `FitReport` does, where Lightning still writes and validates."""
    if is_last_step(trainer):
        trainer.should_stop = True


STOPS = LambdaCallback(on_train_batch_end=stop_at_the_end)


def test_batches_that_accumulate() -> None:
    backward, end = [], []
    callback = LambdaCallback(
        on_after_backward=lambda trainer, *_: backward.append(accumulates(trainer)),
        on_train_batch_end=lambda trainer, *_: end.append((accumulates(trainer), trainer.global_step)),
    )
    fit(callback, batches=7, accumulate_grad_batches=3)
    assert end == [(True, 0), (True, 0), (False, 1), (True, 1), (True, 1), (False, 2), (False, 3)]  # an incomplete one
    assert backward == [waits for waits, _ in end]


@pytest.mark.parametrize("stops", [False, True])
def test_a_validation_follows(stops: bool) -> None:
    events: list[bool | str] = []
    callback = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: events.append(validates_next(trainer)),
        on_validation_start=lambda *_: events.append("validation"),
    )
    fit(*[STOPS] * stops, callback, batches=9, val_check_interval=2, max_steps=5)
    assert events == [
        False,
        True,
        "validation",
        False,
        True,
        "validation",
        *([True, "validation"] if stops else [False]),
    ]


def test_steps_that_are_written() -> None:
    before, after, last, steps, logger = [], [], [], [], Written()

    def see(trainer: pl.Trainer, *_: object) -> None:
        after.append(is_logging_step(trainer))
        last.append(is_last_step(trainer))
        steps.extend([logged_step(trainer)] * after[-1])

    def see_before(trainer: pl.Trainer, *_: object) -> None:
        before.append((is_logging_step(trainer, before_step=True), is_last_step(trainer, before_step=True)))

    callback = LambdaCallback(on_before_optimizer_step=see_before, on_train_batch_end=see)
    fit(callback, STOPS, batches=9, max_steps=6, log_every_n_steps=4, logger=logger, limit_val_batches=0)
    assert after == [False, False, False, True, False, True]
    assert last == [False] * 5 + [True]
    assert before == list(zip(after, last, strict=True))
    assert [step for step, _ in logger.lines] == steps == [3, 5]
    fit(LambdaCallback(on_train_batch_end=see_before), batches=1)  # no max_steps
    assert before[-1] == (False, False)


def test_between_steps_nothing_is_written() -> None:
    found: list[bool] = []
    callback = LambdaCallback(on_train_batch_end=lambda trainer, *_: found.append(is_logging_step(trainer)))
    fit(callback, batches=4, accumulate_grad_batches=2, log_every_n_steps=1)
    assert found == [False, True, False, True]


def test_all_batches_of_a_step_that_is_written() -> None:
    found: list[bool] = []
    callback = LambdaCallback(on_train_batch_start=lambda trainer, *_: found.append(is_of_logging_step(trainer)))
    fit(callback, batches=9, max_steps=3, accumulate_grad_batches=2, log_every_n_steps=2)
    assert found == [False, False, True, True, True, True]  # of the second step, and of the last


def test_the_step_of_a_validation() -> None:
    found, logger = [], Written()
    callback = LambdaCallback(on_validation_end=lambda trainer, *_: found.append(logged_step(trainer)))
    fit(callback, batches=6, val_check_interval=2, logger=logger)
    assert found == [step for step, figures in logger.lines if "val/weight" in figures]
    assert len(found) == 3


def test_a_resumed_run_writes_under_its_own_steps(tmp_path: Path) -> None:
    def written(*callbacks: pl.Callback, **options: Any) -> list[tuple[int | None, dict[str, float]]]:
        logger = Written()
        sets = LambdaCallback(on_train_batch_start=lambda trainer, *_: set_logged_step(trainer))
        fit(sets, *callbacks, log_every_n_steps=1, logger=logger, **options)
        return [line for line in logger.lines if "batch" in line[1]]

    saves = LambdaCallback(on_validation_end=lambda trainer, *_: trainer.save_checkpoint(tmp_path / "x.ckpt"))
    begun = written(STOPS, saves, max_steps=3)  # the validation at its end is one that the resumed run does not expect
    whole = written(max_steps=5)
    assert [(step, figures["batch"]) for step, figures in whole] == [(i, i) for i in range(5)]
    assert begun + written(ckpt_path=tmp_path / "x.ckpt", max_steps=5) == whole


def test_a_run_that_ends_in_a_hook_writes_its_last_step() -> None:
    class EndError(Exception):
        pass

    trainers = []

    def end(trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 3:
            write_logs(trainer)
            trainers.append(trainer)
            raise EndError

    whole, ended = Written(), Written()
    fit(log_every_n_steps=1, logger=whole, limit_val_batches=0)
    with pytest.raises(EndError):
        fit(LambdaCallback(on_train_batch_end=end), log_every_n_steps=1, logger=ended, limit_val_batches=0)
    assert ended.lines == whole.lines[:3]
    assert [figures["batch"] for _, figures in ended.lines] == [0, 1, 2]
    assert trainers[0].callback_metrics["batch"] == 2


def test_modules_with_a_trainer() -> None:
    model, found = Line(), []
    assert not has_trainer(model)
    fit(LambdaCallback(on_train_batch_start=lambda *_: found.append(has_trainer(model))), batches=1, model=model)
    assert found == [True]


def test_random_numbers_go_on() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    states = random_states()
    drawn = draw()
    assert not set(draw()) & set(drawn)
    set_random_states(states)
    assert draw() == drawn
    assert states.keys() == {"python", "numpy", "torch"}


def test_devices_of_a_checkpoint(tmp_path: Path) -> None:
    storage = torch.ones(2).untyped_storage()
    assert saved_device(storage, "cpu") is None
    missing = "xla:0" if torch.cuda.is_available() else "cuda:0"
    assert saved_device(storage, missing).device.type == "cpu"
    torch.save(torch.ones(2), tmp_path / "x.pt")
    torch.testing.assert_close(torch.load(tmp_path / "x.pt", map_location=saved_device), torch.ones(2))


class Numbers(pl.LightningDataModule):
    """Keeps an argument."""

    def __init__(self, count: int = 3, names: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_loggers_get_changed_hyperparameters() -> None:
    data = Numbers(names=["a"])
    data.hparams.update(count=5)
    assert data.hparams_initial["count"] == 3
    set_initial_hparams(data)
    data.hparams.names.append("b")
    assert data.hparams_initial == {"count": 5, "names": ["a"]}


def test_hyperparameters_that_the_command_line_adds() -> None:
    arguments = [f"--data={__name__}.Numbers", "--data.count=4", "--trainer.logger=false"]
    cli = LightningCLI(Line, Numbers, subclass_mode_data=True, run=False, args=arguments, save_config_callback=None)
    assert cli.datamodule.hparams.keys() - {"count", "names"} == set(ADDED_HPARAMS)
    assert cli.datamodule.hparams[CLASS_PATH] == f"{__name__}.Numbers"


def test_gradients_of_a_fused_optimizer_are_clipped() -> None:
    class Fused(Line):
        clips = False

        def configure_optimizers(self) -> Optimizer:
            optimizer = AdamW(self.parameters(), fused=True)
            if self.clips:
                let_clip_gradients(optimizer)
            return optimizer

        def on_train_batch_end(self, *_: object) -> None:
            assert 0 < self.layer.weight.grad.norm() <= 1.001e-3

    model, options = Fused(), {"precision": "bf16-mixed", "gradient_clip_val": 1e-3}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):  # else we need not do anything
        fit(model=model, **options)
    model.clips = True
    fit(model=model, **options)


@pytest.mark.parametrize("version", [0, "first"])
@pytest.mark.parametrize(("purge_step", "left"), [(2, [0, 1, 9]), (None, [0, 1, 2, 3, 9])])
def test_a_logger_goes_on_in_another_folder(
    version: int | str, purge_step: int | None, left: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard reads the files that a process makes within a second in the order of their numbers' text: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    first, again = TensorBoardLogger(tmp_path, version=version), TensorBoardLogger(tmp_path)
    assert (given_version(first), given_version(again)) == (version, None)
    for step in range(4):
        first.log_metrics({"x": step}, step)
    first.finalize("success")
    log_into_version(again, version, purge_step)
    again.log_metrics({"x": 9}, 2)
    again.finalize("success")
    assert again.log_dir == first.log_dir
    events = EventAccumulator(first.log_dir)
    events.Reload()
    assert [event.value for event in events.Scalars("x")] == left


def test_a_csv_logger_writes_to_another_folder(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="a")
    assert given_version(logger) == "a"
    log_into_version(logger, "b")
    logger.log_metrics({"x": 1.0}, 0)
    logger.save()
    assert Path(tmp_path, "lightning_logs/b/metrics.csv").exists()


@pytest.mark.parametrize(
    ("hook", "expected"), [("on_load_checkpoint", True), ("on_save_checkpoint", False), ("on_train_start", False)]
)
def test_errors_of_restoring(hook: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError

    saves = LambdaCallback(on_train_end=lambda trainer, *_: trainer.save_checkpoint(tmp_path / "x.ckpt"))
    fit(saves)
    monkeypatch.setattr(Line, hook, fail)
    with pytest.raises(LookupError) as raised:
        fit(saves, ckpt_path=tmp_path / "x.ckpt", max_epochs=2)
    assert is_of_restoring(raised.value) == expected


def test_every_function_is_tested() -> None:
    called = {node.id for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Name)}
    assert {name for name, x in vars(trainer_state).items() if inspect.getmodule(x) is trainer_state} <= called


# What follows compares `OVERRIDDEN` with Lightning, and looks for private names in our code.


@dataclass(frozen=True)
class Use:
    """A private name in the code."""

    kind: str
    """The class in whose code it stands; empty outside classes."""
    of: str
    """What it is a name of, as the code says it; `self` where the body of a class defines it."""
    name: str
    is_definition: bool
    """Whether the class, or what it sets on its objects, gets the name here."""


def uses(node: ast.AST, kind: str = "") -> Iterator[Use]:
    """Private names of attributes, methods and imports below a node, including those passed to `getattr`."""
    for child in ast.iter_child_nodes(node):
        in_class = isinstance(node, ast.ClassDef)
        names: list[tuple[str, str, bool]] = []
        match child:
            case ast.Attribute():
                names = [(ast.unparse(child.value), child.attr, isinstance(child.ctx, ast.Store))]
            case ast.Call(func=ast.Name("getattr" | "setattr" | "hasattr" | "delattr"), args=[of, ast.Constant(x), *_]):
                names = [(ast.unparse(of), x, False)]
            case ast.FunctionDef() if in_class:
                names = [("self", child.name, True)]
            case ast.Assign() | ast.AnnAssign() if in_class:
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                names = [("self", target.id, True) for target in targets if isinstance(target, ast.Name)]
            case ast.ImportFrom():
                parts = [part for alias in child.names for part in (*child.module.split("."), alias.name)]
                names = [(child.module, part, False) for part in parts]
            case ast.Import():
                names = [(alias.name, part, False) for alias in child.names for part in alias.name.split(".")]
        yield from (Use(kind, *x) for x in names if x[1].startswith("_") and not x[1].endswith("__"))
        yield from uses(child, kind or (child.name if isinstance(child, ast.ClassDef) else ""))


@cache
def own_uses(kind: type) -> list[Use]:
    """Private names that the code of a class uses on its own objects. Code of its base classes does not count."""
    found = uses(ast.parse(textwrap.dedent(inspect.getsource(kind))))
    return [use for use in found if use.of in ("self", "cls")]


def is_of(kind: type, package: str) -> bool:
    return kind.__module__.partition(".")[0] == package


MODULES = [
    import_module(x.name)
    for x in pkgutil.walk_packages(dma_lightning.__path__, "dma_lightning.")
    if x.name not in ("dma_lightning.__main__", trainer_state.__name__)
]
OURS = {x for module in MODULES for x in vars(module).values() if isinstance(x, type) and is_of(x, "dma_lightning")}
RECORDED = {
    pkgutil.resolve_name(kind): {entry.partition("(")[0]: entry for entry in entries}
    for kind, entries in OVERRIDDEN.items()
}


def lightning_classes(kind: type) -> set[type]:
    """Lightning's base classes of one of our classes, or of a class that uses ours as a mixin."""
    made = [below for below in OURS if kind in below.__mro__]
    return {x for below in made for x in below.__mro__ if is_of(x, "lightning")}


def is_allowed(use: Use, module: ModuleType, defined: set[str]) -> bool:
    """Whether a name is our own, one of torch's, or one of Lightning's that is in `OVERRIDDEN`.

    Torch's are the names in its modules and those of every `nn.Module`. (`os._exit` is documented.) Names of
    jsonargparse may be used in `parsing`; `cli/test_strings.py` tests what they are used for. The one name of
    Transformers tells whether a model uses another attention; `huggingface/test_dynamic_masks.py` tests that.

    Args:
        use: where the name is used.
        module: the module that uses it.
        defined: names that classes of that module define.
    """
    if use.of.partition(".")[0] in ("torch", "os") or module is parsing:
        return True
    if use.name == "_attn_implementation":
        return module.__name__ == "dma_lightning.transformers.conversion"
    if use.of not in ("self", "cls", "super()"):
        return use.name in defined or hasattr(nn.Module, use.name)
    kind = getattr(module, use.kind)
    theirs = [x for x in lightning_classes(kind) if use.name in {own.name for own in own_uses(x)}]
    if theirs:  # even if ours defines it, too
        return any(use.name in RECORDED.get(x, ()) for x in theirs)
    ours = [own for x in kind.__mro__ if x in OURS for own in own_uses(x)]
    return any(own.name == use.name and own.is_definition for own in ours) or hasattr(nn.Module, use.name)


def test_private_names_of_lightning_stand_in_one_place() -> None:
    strange = []
    for module in MODULES:
        found = list(uses(ast.parse(inspect.getsource(module) or "\n")))
        defined = {use.name for use in found if use.is_definition and use.of in ("self", "cls")}
        strange += [f"{module.__name__}: {use}" for use in found if not is_allowed(use, module, defined)]
    assert not strange, "\n".join(["give each a function in trainer_state, or a place in its OVERRIDDEN:", *strange])


@pytest.mark.parametrize("kind", RECORDED, ids=lambda kind: kind.__name__)
def test_what_classes_of_ours_override_is_there(kind: type) -> None:
    attributes = {use.name for use in own_uses(kind) if use.is_definition}
    for name, entry in RECORDED[kind].items():
        if "(" in entry:
            assert f"{name}({', '.join(inspect.signature(vars(kind)[name]).parameters)})" == entry
        else:
            assert name in attributes


def test_nothing_is_recorded_that_we_do_not_use() -> None:
    for kind, names in RECORDED.items():
        code = [textwrap.dedent(inspect.getsource(x)) for x in OURS if kind in x.__mro__]
        assert names.keys() <= {use.name for x in code for use in uses(ast.parse(x))}
