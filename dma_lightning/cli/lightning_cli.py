"""LightningCLI as this project needs it: what data, model, trainer and checkpoint say to each other."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from dma_lightning.callbacks import ContinuationWriter
from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.cli.ckpt_path import (
    LINKS,
    check_data,
    check_holds_training,
    check_weights,
    open_argument,
    open_ckpt_path,
    printed_init_from,
    run_folders,
    saved_defaults,
)
from dma_lightning.cli.default_callbacks import DEFAULT_CALLBACKS, add_default_callbacks, check_flags, set_callbacks
from dma_lightning.cli.errors import error_of_ours
from dma_lightning.cli.parsing import Parser
from dma_lightning.cli.trainer_options import check_trainer_options
from dma_lightning.cli.unstarted_runs import UnstartedRuns
from dma_lightning.distributed import SameCheckpoint, end_with_first_process
from dma_lightning.initial_weights import InitialWeights
from dma_lightning.language_model import LanguageModel
from dma_lightning.run_folder import claim_folder, keep_off_other_runs
from dma_lightning.saved_run import SavedRun
from dma_lightning.trainer_state import is_of_restoring, log_into_version


class ConfigOfRun(SaveConfigCallback):
    """Writes the configuration to the run's folder, and says what to do if another run's is there.

    (Lightning's writes it where the logger says, which for some is the same place for all runs.) Without a logger,
    subcommands other than `fit` leave nothing, and write none.

    Args:
        *args: as of `SaveConfigCallback`.
        goes_on_from: the step that the run goes on from, so that a configuration which is there is its own. None: it
            begins.
        checkpoint: the one of that step, if there is one.
        **kwargs: as of `SaveConfigCallback`.

    Raises:
        ValueError: in `setup`, if the folder has one of another run.
    """

    def __init__(
        self, *args: Any, goes_on_from: int | None = None, checkpoint: Path | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs | {"save_to_log_dir": False})
        self.goes_on_from, self.checkpoint = goes_on_from, checkpoint
        self.folder: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.already_saved or (stage != "fit" and not trainer.loggers):
            return
        self.folder, has_its_own = claim_folder(trainer, self.goes_on_from is not None, self.checkpoint)
        if has_its_own:
            self.config_filename, self.overwrite = f"config_from_step_{self.goes_on_from}.yaml", True
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it, in the first process."""
        assert self.folder is not None
        get_filesystem(self.folder).makedirs(self.folder, exist_ok=True)
        path, overwrite = f"{self.folder}/{self.config_filename}", self.overwrite
        self.parser.save(self.config, path, skip_unset=False, overwrite=overwrite, multifile=self.multifile)


class DMACLI(LightningCLI):
    """LightningCLI whose model takes from the data what the data dictates, and whose checkpoints know both.

    With `ckpt_path`, what the checkpoint saved of model and data are the defaults; configs and flags win over them.
    With `model.init_from`, the defaults of the model are what the weights say of it; a checkpoint wins over them.
    `last` is the newest whole checkpoint of all versions of the run's folder; `fit` begins anew where there is none,
    and else goes on in the folder of that version, if TensorBoard's logger made it. No run writes over another's files.
    """

    checkpoint: Path | None = None  # what `ckpt_path` stands for, if it is a file or folder
    initial: InitialWeights | None = None  # of `model.init_from`, likewise, where a run begins
    saved: SavedRun | None = None  # that checkpoint, opened, until trainer, model and data are made
    step = 0  # which that checkpoint was made at
    flags: Sequence[str] = ()  # the arguments of the command line
    resuming = False  # whether that is the last of the run that `fit` was asked to go on with

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that takes no abbreviated options, so that a typo is an error."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for source, target in LINKS.items():
            parser.link_arguments(f"data.{source}", f"model.{target}", apply_on="instantiate")
        assert isinstance(parser, Parser)
        add_default_callbacks(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        self.flags = given if isinstance(given, list) else []
        self.saved = open_argument(args)
        if self.saved is None:  # then a config may name one, or `last` stands for one of this run
            self._take_sizes(printed_init_from(args))  # since parsing ends the process then
            super().parse_arguments(parser, args)
            self.saved = self._configured_checkpoint()
            asks = self.config.get("subcommand") == "fit" and self._subcommand_config().ckpt_path == "last"
            if self.saved is None:
                self.save_config_kwargs = {"goes_on_from": 0 if asks else None}  # or one killed before its first
                if self._take_sizes(self._subcommand_config().get("model", Namespace()).get("init_from")):
                    super().parse_arguments(parser, args)
                return
            self.resuming = asks
        self.checkpoint, self.step, defaults = self.saved.path, self.saved.step, saved_defaults(self.saved)
        self._set_defaults(defaults)
        super().parse_arguments(parser, args)
        check_data(self._subcommand_config().get("data"), self.saved)
        if self.resuming:
            self._check_last(defaults)

    def _check_last(self, defaults: dict[str, Any]) -> None:
        """Compare a run that is to go on with the last run of its folder.

        Raises:
            ValueError: if they are different experiments.
        """
        assert self.checkpoint is not None
        attention, init_from = (self._subcommand_config().model.get(name) for name in ("attention", "init_from"))
        if attention != defaults.get("model.attention", attention):
            raise ValueError(
                f"ckpt_path last: expected attention {defaults['model.attention']!r} as in {self.checkpoint}, got "
                f"{attention!r}; give each experiment a folder of its own by --trainer.logger.init_args.name, or "
                "name the checkpoint to go on from"
            )
        if init_from and Path(init_from).resolve().parent == self.checkpoint.resolve().parent:
            raise ValueError(
                f"ckpt_path last: expected a run that begins from {init_from} to have a folder of its own, got the one "
                "of these weights; name it by --trainer.logger.init_args.name, or leave init_from out to go on"
            )

    def _take_sizes(self, init_from: str | None) -> bool:
        """Take the defaults of the model from the weights that a run begins from; whether there are any.

        Raises:
            ValueError: if there are no such weights.
        """
        if init_from is not None:
            self.initial = InitialWeights.open(init_from, LanguageModel)
            self._set_defaults({f"model.{name}": x for name, x in self.initial.arguments.items()})
        return init_from is not None

    def _set_defaults(self, defaults: dict[str, Any]) -> None:
        for subparser in self._subcommand_parsers.values():
            subparser.set_defaults(defaults)

    def _subcommand_config(self) -> Namespace:
        return self.config.get(self.config.get("subcommand") or "", Namespace())

    def _configured_checkpoint(self) -> SavedRun | None:
        """The checkpoint that the parsed configuration stands for.

        Raises:
            ValueError: if there is none, unless `fit` shall go on with the last; if it cannot be read.
        """
        config = self._subcommand_config()
        path = config.get("ckpt_path")
        if path != "last":
            return open_ckpt_path(path)
        folders = run_folders(config)
        found = SavedRun.newest(folders)
        where = " or ".join(str(folder) for folder in folders)
        if found is None and self.config.subcommand != "fit":
            raise ValueError(f"ckpt_path: expected a checkpoint below {where}, found none to take as the last")
        rank_zero_only(print)(
            f"ckpt_path last: no checkpoint below {where}; training begins anew"
            if found is None
            else f"ckpt_path last: {found.path}"
        )
        return found

    def instantiate_classes(self) -> None:
        if self.saved is not None:  # before anything is made that could be too large
            if self.subcommand == "fit":
                check_holds_training(self.saved)
            arguments = self._subcommand_config().model.as_dict()
            check_weights(self.saved, arguments)
        if self.initial is not None:
            self.initial.check(self._subcommand_config().model.as_dict())
            self.initial = None  # the model opens it again, in each process
        super().instantiate_classes()
        if self.saved is not None:  # now with what the data dictates
            check_weights(self.saved, arguments | {"vocab_size": self.model.hparams.vocab_size})
            self.saved = None  # training may delete the file
        if self.subcommand is not None:
            config = self.config_init[self.subcommand]
            if self.checkpoint is not None:
                config.ckpt_path = str(self.checkpoint)
            elif config.ckpt_path == "last":
                config.ckpt_path = None
            elif config.ckpt_path is None and self.subcommand != "fit" and self.model.init_from is None:
                rank_zero_warn(f"{self.subcommand}: no --ckpt_path is given, so the weights are random")
            if config.ckpt_path is not None:
                self.model.init_from = None  # the checkpoint has its own weights

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, unless all steps are made; a run that ends before it has trained leaves no files.

        Raises:
            ValueError: if Lightning cannot restore what a checkpoint holds; with its name.
        """
        if subcommand == "fit" and 0 < self.trainer.max_steps <= self.step:
            done = f"{self.step} of {self.trainer.max_steps} steps are done"
            rank_zero_only(print)(f"nothing to do: {done}; raise trainer.max_steps")
            return
        unstarted = UnstartedRuns(self.trainer) if subcommand == "fit" else None
        if unstarted is not None:
            # First, so that it knows before another callback fails.
            self.trainer.callbacks.insert(0, unstarted)  # type: ignore[attr-defined]  # Lightning sets it undeclared
        try:
            self._run_or_name_checkpoint(subcommand)
        finally:
            if unstarted is not None:
                unstarted.clean()

    def _run_or_name_checkpoint(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (AttributeError, AssertionError, LookupError, TypeError, ValueError) as error:
            reason = f"{error_of_ours(error) or repr(error)}"
            if self.checkpoint is None or not is_of_restoring(error) or str(self.checkpoint) in reason:
                raise
            raise ValueError(
                f"ckpt_path {self.checkpoint}: expected states that this run can go on with, got others: {reason}"
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with atomic checkpoints; for `predict` with a writer of continuations, if no other is there."""
        if self.resuming:
            self._log_where_it_was()
        for logger in self._loggers():
            keep_off_other_runs(logger, goes_on=self.save_config_kwargs.get("goes_on_from") is not None)
        if self.subcommand not in (None, "fit"):  # the callbacks that a checkpoint has states of are for training
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
        options = self._get(self.config_init, "trainer")
        check_trainer_options(options)
        if self.subcommand not in (None, "fit") and options.logger is None:
            options.logger = False  # Lightning's default would make lightning_logs for a few figures that are printed
        defaults = {name: self._get(self.config_init, name) for name in DEFAULT_CALLBACKS}
        check_flags(self.flags, defaults, options)
        set_callbacks(options, defaults, fits=self.subcommand in (None, "fit"))
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it undeclared
        callbacks.append(SameCheckpoint(self.checkpoint))
        if self.subcommand != "predict":  # in which no process needs another, and each takes its time
            end_with_first_process(trainer)
        writes = any(isinstance(callback, BasePredictionWriter) for callback in callbacks)
        if self.subcommand == "predict" and not writes:
            callbacks.append(ContinuationWriter())
        return trainer

    def _loggers(self) -> list[Any]:
        """As the configuration has them: objects, or whether there shall be the trainer's own."""
        loggers = self._get(self.config_init, "trainer").logger
        return loggers if isinstance(loggers, list) else [loggers]

    def _log_where_it_was(self) -> None:
        """Let TensorBoard's loggers go on in the folder where the last checkpoint was found.

        What was logged after that checkpoint is taken out of the curves, since it is computed again. (Loggers of files,
        as Lightning's for CSV, would write over those that are there.)
        """
        assert self.checkpoint is not None
        assert self.saved is not None
        trainer, folder = self._get(self.config_init, "trainer"), self.checkpoint.resolve().parents[1]
        step = self.saved.step
        for logger in self._loggers():
            if not isinstance(logger, TensorBoardLogger):
                continue
            root = Path(logger.root_dir).expanduser().resolve()
            is_done = 0 < trainer.max_steps <= step  # and logs nothing more
            number = folder.name.removeprefix("version_")
            plain = number.isdecimal() and folder.name == f"version_{int(number)}"
            if root in (folder, folder.parent):
                version = "" if root == folder else int(number) if plain else folder.name
                log_into_version(logger, version, None if is_done else step)
        self.save_config_kwargs = {"goes_on_from": step, "checkpoint": self.checkpoint}
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's own would let the checkpoint's values win over the command line's."""
