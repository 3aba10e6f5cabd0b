"""Some steps keep every key: which ones, for how long, and without effect on anything else in a run."""

import functools
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from chosen_form import CHOSEN
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from dma_kernels import KeepRule
from dma_lightning import LanguageModel, MQARDataModule
from dma_lightning.callbacks import MixedWindows
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.io import newest_checkpoint
from dma_lightning.model import decoder_of

ROOT = Path(__file__).parents[3]
OWN, ALL = KeepRule(4, 1, 1), KeepRule(16)
FORMS = pytest.mark.parametrize("form", [{}, CHOSEN | {"keep_last": 1}], ids=["published", "chosen"])
STEPS = 9
WIDE = [True, True, True, False, True, True, True, False, False]  # of seed 0 and a share of one half
OUTSIDE = (
    "on_sanity_check_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_start",
    "on_validation_end", "on_save_checkpoint", "on_train_epoch_end", "on_train_end", "on_fit_end", "on_exception",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread, which is faster for tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class OnPurposeError(Exception):
    """Raised by a test to interrupt training."""


class Watch(pl.Callback):
    """Records the layers' rules in forward passes and outside of steps. It is listed first, so its hooks run first."""

    def __init__(self, at_batch: int = 0, action: Callable[[], None] | None = None) -> None:
        self.at_batch, self.action = at_batch, action
        self.training: dict[int, set[KeepRule]] = {}  # by the step, in its forward and backward passes
        self.evaluating: set[KeepRule] = set()
        self.outside: dict[str, set[KeepRule]] = {}
        self.losses: dict[int, float] = {}  # by the batch
        self.module: pl.LightningModule | None = None
        for hook in OUTSIDE:
            setattr(self, hook, functools.partial(self._see, hook))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.module = pl_module
        for mixer in decoder_of(pl_module).mixers:
            mixer.register_forward_pre_hook(lambda mixer, _: self._run(mixer.keep))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.losses[batch] = loss.item()
        if batch == self.at_batch:
            self.action()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.training[trainer.global_step].update(self._rules())

    def _rules(self) -> set[KeepRule]:
        return {mixer.keep for mixer in decoder_of(self.module).mixers}

    def _run(self, rule: KeepRule) -> None:
        if self.module.training:
            self.training.setdefault(self.module.global_step, set()).add(rule)
        else:
            self.evaluating.add(rule)

    def _see(self, hook: str, *_: object) -> None:
        self.outside.setdefault(hook, set()).update(self._rules())


def train(
    watch: Watch,
    *callbacks: pl.Callback,
    ckpt_path: Path | None = None,
    model: dict[str, object] | None = None,
    **options: object,
) -> tuple[pl.Trainer, dict[str, Tensor]]:
    """Train nine steps of two batches (6 1/2 steps per epoch), with dropout and validations; the final weights."""
    pl.seed_everything(1, verbose=False)
    sizes = {"vocab_size": 64, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_dropout": 0.2}
    rule = {"keep_window_size": OWN.window, "keep_last": OWN.last, "sinks": OWN.sinks}
    module = LanguageModel(**(sizes | heads | rule | (model or {})))
    arguments = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ResumableCheckpoint) for callback in callbacks),
    }
    trainer = pl.Trainer(**(arguments | options), callbacks=[watch, *callbacks])
    data = MQARDataModule(64, 16, 2, train_examples=52, val_examples=4, batch_size=4)
    torch.manual_seed(123 if ckpt_path else 1)  # a resumed process begins with other random numbers
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module.state_dict()


def half() -> MixedWindows:
    """Mixed windows with the share that `WIDE` assumes."""
    return MixedWindows(share=0.5)


def fail() -> None:
    raise OnPurposeError


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_which_steps_keep_all_keys() -> None:
    """In any process, on any machine: the same."""
    first = list(range(20))
    for seed, between in ((0, [20, 29, 30, 42, 45, 64]), (1, [30, 47, 53]), (7, [30, 43, 44, 55, 73, 78])):
        for rank in range(2):  # whose random numbers differ
            torch.manual_seed(rank)
            mixed = MixedWindows(seed=seed)
            assert [step for step in range(100) if mixed.keeps_all(step, 100)] == first + between
    assert [half().keeps_all(step, STEPS) for step in range(STEPS)] == WIDE


def test_share_of_the_steps_between() -> None:
    for share in (0.0, 0.125, 0.5, 1.0):
        mixed, count = MixedWindows(share=share, first=0, last=0, seed=3), 20_000
        found = sum(mixed.keeps_all(step, count) for step in range(count)) / count
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)  # standard deviations


@pytest.mark.parametrize(
    ("first", "last", "steps", "wide"),
    [
        (0.3, 0.2, 10, [0, 1, 2]),
        (1.0, 0.0, 5, [0, 1, 2, 3, 4]),
        (0.0, 1.0, 5, []),
        (0.7, 0.3, 5, [0, 1, 2]),  # both are rounded up, and the end has the window
        (0.1, 0.9, 1, []),
    ],
)
def test_phases(first: float, last: float, steps: int, wide: list[int]) -> None:
    never = MixedWindows(share=0, first=first, last=last)
    assert [step for step in range(steps) if never.keeps_all(step, steps)] == wide
    always = MixedWindows(share=1, first=first, last=last)
    narrow = steps - round(last * steps)
    assert [step for step in range(steps) if always.keeps_all(step, steps)] == list(range(narrow))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_batches_of_a_step_and_nothing_else(checkpointing: bool, tmp_path: Path) -> None:
    watch = Watch()
    model = {"activation_checkpointing": checkpointing}
    saving = ResumableCheckpoint(1, dirpath=tmp_path)
    trainer, _ = train(watch, half(), saving, model=model)
    assert watch.training == {step: {ALL if wide else OWN} for step, wide in enumerate(WIDE)}
    assert watch.evaluating == {OWN}
    assert watch.outside == {hook: {OWN} for hook in OUTSIDE if hook != "on_exception"}
    assert set(watch.losses) == set(range(1, 18))  # two batches a step, but one at the end of the epoch
    assert {mixer.keep for mixer in trainer.lightning_module.model.mixers} == {OWN}
    arguments = torch.load(tmp_path / "step=9.ckpt", weights_only=True)["hyper_parameters"]
    assert (arguments["keep_window_size"], arguments["keep_last"], arguments["sinks"]) == (4, 1, 1)


def test_steps_that_keep_all_keys_are_those_of_a_model_that_does() -> None:
    """And the others those of one that never does."""
    wide, narrow, model = Watch(), Watch(), {"hidden_dropout": 0.0}
    train(wide, MixedWindows(share=0, first=0.5, last=0), model=model, max_steps=4)
    train(narrow, MixedWindows(share=0, first=0, last=0), model=model, max_steps=4)
    every, own = Watch(), Watch()
    train(every, model=model | {"keep_window_size": 16, "keep_last": 0, "sinks": 0}, max_steps=2)
    train(own, model=model, max_steps=4)
    assert narrow.losses == own.losses
    assert {batch: wide.losses[batch] for batch in range(1, 5)} == every.losses != own.losses


@pytest.mark.parametrize(("hook", "value"), [("training_step", None), ("on_train_batch_start", -1)])
def test_a_batch_that_is_skipped(hook: str, value: int | None) -> None:
    class Skip(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            setattr(pl_module, hook, lambda *_: value)

    watch, twice = Watch(), {"max_epochs": 2, "limit_train_batches": 3}
    train(watch, half(), Skip(), max_steps=20, val_check_interval=1.0, check_val_every_n_epoch=1, **twice)
    assert watch.evaluating == {OWN}
    assert watch._rules() == {OWN}


@FORMS
@pytest.mark.parametrize("action", [fail, terminate])
@pytest.mark.parametrize("batch", [7, 9, 10])  # the first of a step with its own rule or with all keys, and the last
def test_resumed_run_is_the_same_run(
    batch: int, action: Callable[[], None], form: dict[str, object], tmp_path: Path
) -> None:
    """Wherever it resumes, the kind of steps changes there, or at the next step."""
    whole, before, after = Watch(), Watch(batch, action), Watch()
    _, expected = train(whole, half(), model=form)
    with pytest.raises(OnPurposeError if action is fail else SystemExit):
        train(before, half(), ResumableCheckpoint(1, dirpath=tmp_path), model=form)
    step = (batch - 1) // 2
    assert before.training[step] == {ALL if WIDE[step] else OWN} != before.training[step - 1]
    assert before._rules() == {OWN}
    path = newest_checkpoint([tmp_path])
    assert path.name == (f"step={step}.ckpt" if action is fail else f"step={step + 1}.ckpt")
    _, found = train(after, half(), ResumableCheckpoint(1, dirpath=tmp_path), ckpt_path=path, model=form)
    assert before.losses | after.losses == whole.losses
    assert before.training | after.training == whole.training
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_restored_after_an_exception() -> None:
    watch = Watch(3, fail)
    with pytest.raises(OnPurposeError):
        train(watch, half())
    assert watch.training[1] == {ALL}
    assert watch._rules() == {OWN}


@FORMS
def test_two_graphs_and_none_that_is_stale(form: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object], **_: object) -> Callable[..., object]:
        assert all(isinstance(x, Tensor) for x in inputs)  # no size of a window that may vary
        number = len(graphs)
        graphs.append(number)

        def run(*args: object) -> object:
            calls.append(number)
            return graph(*args)

        return run

    options = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "accumulate_grad_batches": 1}
    model = {"hidden_dropout": 0.0} | form
    written, compiled = Watch(), Watch()
    _, expected = train(written, half(), model=model, **options)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # Hooks on modules would be compiled, too.
    monkeypatch.setattr(Watch, "setup", lambda self, trainer, pl_module, stage: setattr(self, "module", pl_module))
    monkeypatch.setattr(Watch, "on_after_backward", lambda *_: None)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        _, found = train(compiled, half(), model=model | {"compile_layers": True}, **options)
    torch._dynamo.reset()
    assert compiled.losses == written.losses
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # gates are added up in another order if compiled
    assert len(graphs) == 3  # all keys, the loss, the model's own rule
    assert calls == [number for wide in WIDE for number in ((0, 0, 1) if wide else (2, 2, 1))]


def test_what_is_logged(tmp_path: Path) -> None:
    class Lines(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            lines.extend([(step, metrics["dma/keeps_all"])] if "dma/keeps_all" in metrics else [])

    lines: list[tuple[int, float]] = []
    train(Watch(), half(), logger=Lines(tmp_path), log_every_n_steps=2)
    assert lines == [(1, 1.0), (3, 0.0), (5, 1.0), (7, 0.0)]
    page = (ROOT / "docs/tensorboard.md").read_text()
    assert re.search(r"^\| `dma/keeps_all` \|", page, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        {"share": -0.1},
        {"share": 1.1},
        {"share": float("nan")},
        {"first": -1.0},
        {"last": 2.0, "first": 0.0},
        {"first": 0.6, "last": 0.5},
    ],
)
def test_shares_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected share, first and last within 0 and 1, .* got .*; change these"):
        MixedWindows(**arguments)


def test_shares_of_the_steps_of_epochs() -> None:
    """13 batches in each of two epochs, two a step: 14 steps."""
    watch, epochs = Watch(), {"max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    train(watch, MixedWindows(share=0, first=0.5, last=0.5), **epochs)
    assert [step for step, rules in watch.training.items() if rules == {ALL}] == list(range(7))
    assert [step for step, rules in watch.training.items() if rules == {OWN}] == list(range(7, 14))
    watch = Watch()
    train(watch, MixedWindows(share=0, first=0.5, last=0.5), **epochs | {"max_steps": 20})  # as the schedule counts
    assert [step for step, rules in watch.training.items() if rules == {OWN}] == list(range(10, 14))


def test_shares_of_no_number_of_steps() -> None:
    endless = {"max_steps": -1, "max_epochs": -1, "max_time": {"seconds": 1}, "model": {"schedule": "constant"}}
    with pytest.raises(ValueError, match=r"got max_steps -1 and max_epochs -1; set max_steps, or first and last to 0"):
        train(Watch(), half(), **endless)
    watch = Watch()
    train(watch, MixedWindows(share=0.5, first=0, last=0), **endless)
    assert set.union(*watch.training.values()) == {ALL, OWN}


def test_nothing_to_widen() -> None:
    with pytest.raises(ValueError, match=r"expected layers with dynamic masks, got .* attention swa; train dma, or"):
        train(pl.Callback(), half(), model={"attention": "swa"})
