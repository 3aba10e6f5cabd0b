"""The command line: `dma-lightning fit | validate | test | predict`, which are Lightning's, and commands of our own."""

import argparse
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import auto_cli, set_parsing_settings
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dma_lightning.callbacks import ContinuationWriter
from dma_lightning.data import SequenceDataModule
from dma_lightning.generate_command import generate
from dma_lightning.huggingface_commands import export_hf, import_hf
from dma_lightning.language_model import LanguageModel
from dma_lightning.prepare_command import prepare
from dma_lightning.sizes_command import sizes

# What the data dictates to the model: attribute of the data module, and argument of the model.
_LINKS = {
    "vocab_size": "vocab_size",
    "sequence_length": "max_position_embeddings",
    "bytes_per_token": "bytes_per_token",
}

_COMMANDS = {
    "generate": generate,
    "prepare": prepare,
    "sizes": sizes,
    "import-hf": import_hf,
    "export-hf": export_hf,
}

_LIGHTNING_CHECKPOINTS = {"best", "last", "hpc", "registry"}


class DMACLI(LightningCLI):
    """LightningCLI whose model takes from the data what the data dictates, and whose checkpoints know both.

    With `--ckpt_path`, what the checkpoint saved of model and data are the defaults; configs and flags win over them.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that takes no abbreviated options, so that a typo is an error."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for source, target in _LINKS.items():
            parser.link_arguments(f"data.{source}", f"model.{target}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        checkpoint = _checkpoint_argument(args)
        if checkpoint is not None:
            for subparser in self._subcommand_parsers.values():
                subparser.set_defaults(_saved_arguments(checkpoint))
        super().parse_arguments(parser, args)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer; for `predict` with a writer of continuations, if no other writer is there."""
        trainer = super().instantiate_trainer(**kwargs)
        writes = any(isinstance(callback, BasePredictionWriter) for callback in trainer.callbacks)
        if self.subcommand == "predict" and not writes:
            trainer.callbacks.append(ContinuationWriter())
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's own would let the checkpoint's values win over the command line's."""


def _checkpoint_argument(args: ArgsType) -> Path | None:
    """The checkpoint file that `--ckpt_path` names, unless it is a URL or one of Lightning's keywords.

    Raises:
        ValueError: if there is no such file.
    """
    if args is not None and not isinstance(args, list):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    path = parser.parse_known_args(args)[0].ckpt_path
    if not path or "://" in path or path.split(":")[0] in _LIGHTNING_CHECKPOINTS:
        return None
    if not Path(path).exists():
        raise ValueError(f"--ckpt_path: expected an existing checkpoint, got {path!r}; look under runs/")
    return Path(path) if Path(path).is_file() else None  # a folder is a sharded checkpoint, which Lightning reads


def _saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """Arguments of model and data that a checkpoint was made with."""
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    model = saved.get(LanguageModel.CHECKPOINT_HYPER_PARAMS_KEY, {})
    data = saved.get(SequenceDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    dictated = {"_instantiator", *_LINKS.values()}
    defaults: dict[str, Any] = {f"model.{name}": value for name, value in model.items() if name not in dictated}
    if "_class_path" in data:
        init_args = {name: value for name, value in data.items() if not name.startswith("_")}
        defaults["data"] = {"class_path": data["_class_path"], "init_args": init_args}
    return defaults


def build_cli(args: ArgsType = None, run: bool = True) -> DMACLI:
    """Parse arguments (by default the command line's), build trainer, model and data, and run the subcommand.

    Args:
        args: a list of arguments, or a nested dictionary.
        run: with False, `args` name no subcommand and nothing is run.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return DMACLI(
        LanguageModel,
        SequenceDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_kwargs={
            "description": "Train and evaluate language models with dynamic mask attention. "
            "Besides the subcommands below: " + ", ".join(f"`dma-lightning {name} --help`" for name in _COMMANDS) + "."
        },
        args=args,
        run=run,
    )


def main() -> None:
    """The console script."""
    name, *args = sys.argv[1:] or [""]
    if name not in _COMMANDS:
        build_cli()
        return
    try:
        options = {"as_positional": name != "generate", "prog": f"dma-lightning {name}", "allow_abbrev": False}
        auto_cli(_COMMANDS[name], args=args, **options)
    except (ValueError, OSError) as error:
        sys.exit(f"dma-lightning {name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"dma-lightning {name}: interrupted")
