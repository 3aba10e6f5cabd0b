"""Callbacks that every run of `fit` has by default. Each has its own option."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.utilities import rank_zero_warn

from dma_lightning.callbacks import FitReport, GradientGuard, MixedWindows
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.cli.parsing import Parser
from dma_lightning.monitoring import (
    ContextMonitor,
    CurveOverview,
    DynamicMaskMonitor,
    FinalMetrics,
    ProgressBar,
    RunSummary,
    SampleMonitor,
    SpeedMonitor,
)

# In calling order; Lightning moves callbacks that write checkpoints to the end.
DEFAULT_CALLBACKS: dict[str, type[pl.Callback]] = {
    "lr_monitor": LearningRateMonitor,
    "speed_monitor": SpeedMonitor,
    "context_monitor": ContextMonitor,  # before others, whose extra passes also exchange keys
    "mask_monitor": DynamicMaskMonitor,
    "sample_monitor": SampleMonitor,
    "final_metrics": FinalMetrics,
    "curve_overview": CurveOverview,
    "run_summary": RunSummary,
    "progress_bar": ProgressBar,
    "mixed_windows": MixedWindows,
    "guard": GradientGuard,
    "checkpoint": ResumableCheckpoint,
    "fit_report": FitReport,
}

# Trainer options with which Lightning adds its own callback if ours is off and none of the kind is listed.
_OF_LIGHTNING = {
    "progress_bar": ("enable_progress_bar", LightningProgressBar),
    "checkpoint": ("enable_checkpointing", Checkpoint),
}

# Callbacks that Lightning refuses if the trainer option is false.
_REFUSED = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint, "logger": LearningRateMonitor}


def add_default_callbacks(parser: Parser) -> None:
    """Add an option for each default callback to a parser."""
    title = "Default callbacks of fit; each is off if its option is null, or if trainer.callbacks has one of its class"
    parser.add_objects(DEFAULT_CALLBACKS, title)


def set_callbacks(
    options: Namespace, defaults: Mapping[str, pl.Callback | None], fits: bool, learns_ranks: bool
) -> None:
    """Put all callbacks of a run into the trainer's options, the default ones before the listed ones.

    A listed callback replaces the default of its class, and any listed progress bar replaces ours. Callbacks that a
    trainer option turns off are left out, even if they are listed.

    Args:
        options: options of the trainer; changed in place.
        defaults: default callbacks by name, None if off.
        fits: whether the run trains; otherwise only the progress bar is used.
        learns_ranks: whether the model has a retention loss; otherwise the default `MixedWindows` is left out.
    """
    listed = _listed(options)
    names = [x for x in DEFAULT_CALLBACKS if fits or x == "progress_bar"] if not options.barebones else []
    for name, (option, kind) in _OF_LIGHTNING.items():
        if name in names and defaults[name] is None and not any(isinstance(x, kind) for x in listed):
            options[option] = bool(options[option])
    if "guard" in names and f"{options.precision}" in ("16", "16-mixed") and defaults["guard"] is not None:
        rank_zero_warn("guard: left out, since precision 16-mixed skips steps by itself; --guard null silences this")
        names.remove("guard")
    if not learns_ranks and "mixed_windows" in names:
        names.remove("mixed_windows")
    chosen = [defaults[name] for name in names if not _replaces(name, listed)]
    refused = tuple(kind for option, kind in _REFUSED.items() if options[option] in (False, []))
    options.callbacks = [x for x in [*chosen, *listed] if x is not None and not isinstance(x, refused)]


def check_flags(flags: Sequence[str], defaults: Mapping[str, pl.Callback | None], options: Namespace) -> None:
    """Check that no flag sets a default callback that a listed one replaces.

    Args:
        flags: the arguments of the command line.
        defaults: default callbacks by name, None if off.
        options: options of the trainer.

    Raises:
        ValueError: if a flag does.
    """
    for flag in (x.partition("=")[0] for x in flags):
        name = flag.removeprefix("--").partition(".")[0]
        if flag.startswith("--") and defaults.get(name) is not None and _replaces(name, _listed(options)):
            raise ValueError(
                f"{flag}: expected no {DEFAULT_CALLBACKS[name].__name__} in trainer.callbacks, got one, which is used "
                "instead; set the option there, or remove it from the list"
            )


def _listed(options: Namespace) -> list[pl.Callback]:
    """The callbacks in a trainer's options."""
    listed = options.callbacks or []
    return listed if isinstance(listed, list) else [listed]


def _replaces(name: str, listed: Sequence[Any]) -> bool:
    """Whether a listed callback replaces a default."""
    kind = LightningProgressBar if name == "progress_bar" else DEFAULT_CALLBACKS[name]
    return any(isinstance(x, kind) for x in listed)
