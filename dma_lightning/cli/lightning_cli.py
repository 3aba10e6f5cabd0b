"""LightningCLI for this project: connects data, model, trainer and checkpoint."""

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
from dma_lightning.callbacks.mixed_windows import learns_ranks
from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.cli.ckpt_path import (
    LINKS,
    check_data,
    check_holds_training,
    check_optimizer,
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
    """Writes the configuration to the run's folder, and refuses a folder with another run's configuration.

    (Lightning's callback writes it to the logger's folder, which some loggers share among runs.) Without a logger,
    only `fit` writes it.

    Args:
        *args: as in `SaveConfigCallback`.
        goes_on_from: the step that the run resumes from; an existing configuration is then its own. None: a new run.
        checkpoint: the checkpoint of that step, if there is one.
        **kwargs: as in `SaveConfigCallback`.

    Raises:
        ValueError: in `setup`, if the folder has another run's configuration.
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
        """Write the configuration, in the first process."""
        assert self.folder is not None
        get_filesystem(self.folder).makedirs(self.folder, exist_ok=True)
        path, overwrite = f"{self.folder}/{self.config_filename}", self.overwrite
        self.parser.save(self.config, path, skip_unset=False, overwrite=overwrite, multifile=self.multifile)


class DMACLI(LightningCLI):
    """LightningCLI that sets sizes of the model from the data, and takes defaults from checkpoints.

    With `ckpt_path`, the checkpoint's arguments of model and data are the defaults; configs and flags override them.
    With `model.init_from`, the weights' arguments are the defaults of the model; a checkpoint's override them. `last`
    is the newest whole checkpoint of all versions in the run's folder. Without one, `fit` starts a new run; with one,
    it continues in the folder of that version if TensorBoard's logger created it. No run overwrites another's files.
    """

    checkpoint: Path | None = None  # the file or folder that `ckpt_path` names
    initial: InitialWeights | None = None  # the weights of `model.init_from`, for a new run
    saved: SavedRun | None = None  # the checkpoint, opened, until trainer, model and data are built
    step = 0  # step of the checkpoint
    flags: Sequence[str] = ()  # the arguments of the command line
    resuming = False  # whether `fit` resumes from `last`

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser without abbreviated options, so that a typo is an error."""
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
        if self.saved is None:  # a config may name one, or `last` may mean one of this run
            self._take_sizes(printed_init_from(args))  # now, because parsing a --print_config ends the process
            super().parse_arguments(parser, args)
            self.saved = self._configured_checkpoint()
            asks = self.config.get("subcommand") == "fit" and self._subcommand_config().ckpt_path == "last"
            if self.saved is None:
                self.save_config_kwargs = {"goes_on_from": 0 if asks else None}  # 0: there may have been no save yet
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
        """Compare a resumed run with the last run in its folder.

        Raises:
            ValueError: if they are different experiments.
        """
        assert self.checkpoint is not None
        attention, init_from = (self._subcommand_config().model.get(name) for name in ("attention", "init_from"))
        if attention != defaults.get("model.attention", attention):
            raise ValueError(
                f"ckpt_path last: expected attention {defaults['model.attention']!r} as in {self.checkpoint}, got "
                f"{attention!r}; give each experiment its own folder with --trainer.logger.init_args.name, or "
                "name the checkpoint to resume from"
            )
        if init_from and Path(init_from).resolve().parent == self.checkpoint.resolve().parent:
            raise ValueError(
                f"ckpt_path last: expected a run that starts from {init_from} to have its own folder, got the folder "
                "of these weights; name one with --trainer.logger.init_args.name, or remove init_from to resume"
            )

    def _take_sizes(self, init_from: str | None) -> bool:
        """Take the model's defaults from the weights of `init_from`; returns whether it is set.

        Raises:
            ValueError: if the weights do not exist.
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
        """Open the checkpoint that the parsed configuration names.

        Raises:
            ValueError: if it cannot be read, or does not exist; for `fit`, `last` need not exist.
        """
        config = self._subcommand_config()
        path = config.get("ckpt_path")
        if path != "last":
            return open_ckpt_path(path)
        folders = run_folders(config)
        found = SavedRun.newest(folders)
        where = " or ".join(str(folder) for folder in folders)
        if found is None and self.config.subcommand != "fit":
            raise ValueError(f"ckpt_path: expected a checkpoint below {where}, got none to use as the last")
        rank_zero_only(print)(
            f"ckpt_path last: no checkpoint below {where}; training starts from scratch"
            if found is None
            else f"ckpt_path last: {found.path}"
        )
        return found

    def instantiate_classes(self) -> None:
        if self.saved is not None:  # before building anything that could be too large
            arguments = self._subcommand_config().model.as_dict()
            if self.subcommand == "fit":
                check_holds_training(self.saved)
                check_optimizer(self.saved, arguments)
            check_weights(self.saved, arguments)
        if self.initial is not None:
            self.initial.check(self._subcommand_config().model.as_dict())
            self.initial = None  # the model opens it again, in each process
        super().instantiate_classes()
        if self.saved is not None:  # now with the data's sizes
            check_weights(self.saved, arguments | {"vocab_size": self.model.hparams.vocab_size})
            self.saved = None  # training may delete the file
        if self.subcommand is not None:
            config = self.config_init[self.subcommand]
            if self.checkpoint is not None:
                config.ckpt_path = str(self.checkpoint)
            elif config.ckpt_path == "last":
                config.ckpt_path = None
            elif config.ckpt_path is None and self.subcommand != "fit" and self.model.init_from is None:
                rank_zero_warn(f"{self.subcommand}: no --ckpt_path given, so the weights are random")
            if config.ckpt_path is not None:
                self.model.init_from = None  # the checkpoint has its own weights

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand, unless all its steps are done; a run that ends before it trains leaves no files.

        Raises:
            ValueError: if Lightning cannot restore a checkpoint's state; the message names the checkpoint.
        """
        if subcommand == "fit" and 0 < self.trainer.max_steps <= self.step:
            done = f"{self.step} of {self.trainer.max_steps} steps are done"
            rank_zero_only(print)(f"nothing to do: {done}; raise trainer.max_steps")
            return
        unstarted = UnstartedRuns(self.trainer) if subcommand == "fit" else None
        if unstarted is not None:
            # First, so that it sees a step before another callback fails.
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
                f"ckpt_path {self.checkpoint}: expected states that this run can resume from, got others: {reason}"
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with atomic checkpoints; `predict` gets a `ContinuationWriter` if no writer is listed."""
        if self.resuming:
            self._log_where_it_was()
        for logger in self._loggers():
            keep_off_other_runs(logger, goes_on=self.save_config_kwargs.get("goes_on_from") is not None)
        if self.subcommand not in (None, "fit"):  # callbacks with saved states are for training
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
        options = self._get(self.config_init, "trainer")
        check_trainer_options(options)
        if self.subcommand not in (None, "fit") and options.logger is None:
            options.logger = False  # Lightning would create lightning_logs for a few numbers that it prints
        defaults = {name: self._get(self.config_init, name) for name in DEFAULT_CALLBACKS}
        check_flags(self.flags, defaults, options)
        set_callbacks(options, defaults, self.subcommand in (None, "fit"), learns_ranks=learns_ranks(self.model))
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it undeclared
        callbacks.append(SameCheckpoint(self.checkpoint))
        if self.subcommand != "predict":  # its processes are independent and may end at different times
            end_with_first_process(trainer)
        writes = any(isinstance(callback, BasePredictionWriter) for callback in callbacks)
        if self.subcommand == "predict" and not writes:
            callbacks.append(ContinuationWriter())
        return trainer

    def _loggers(self) -> list[Any]:
        """The loggers in the configuration: objects, or whether to use the trainer's own."""
        loggers = self._get(self.config_init, "trainer").logger
        return loggers if isinstance(loggers, list) else [loggers]

    def _log_where_it_was(self) -> None:
        """Let TensorBoard's loggers continue in the folder of the last checkpoint.

        Points logged after that checkpoint are removed from the curves, because they are computed again. (Loggers that
        write plain files, such as Lightning's CSVLogger, would overwrite the existing ones.)
        """
        assert self.checkpoint is not None
        assert self.saved is not None
        trainer, folder = self._get(self.config_init, "trainer"), self.checkpoint.resolve().parents[1]
        step = self.saved.step
        for logger in self._loggers():
            if not isinstance(logger, TensorBoardLogger):
                continue
            root = Path(logger.root_dir).expanduser().resolve()
            is_done = 0 < trainer.max_steps <= step  # so nothing more is logged
            number = folder.name.removeprefix("version_")
            plain = number.isdecimal() and folder.name == f"version_{int(number)}"
            if root in (folder, folder.parent):
                version = "" if root == folder else int(number) if plain else folder.name
                log_into_version(logger, version, None if is_done else step)
        self.save_config_kwargs = {"goes_on_from": step, "checkpoint": self.checkpoint}
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's version would let the checkpoint override the command line."""
