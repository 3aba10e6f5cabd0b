"""The command line: Lightning's `dma-lightning fit | validate | test | predict`, and our own commands."""

import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli, auto_parser
from lightning.pytorch.cli import ArgsType

from dma_lightning import __version__
from dma_lightning.cli.errors import told_errors
from dma_lightning.cli.evaluate import evaluate
from dma_lightning.cli.extrapolation import extrapolation
from dma_lightning.cli.generate import generate
from dma_lightning.cli.huggingface import export_hf, import_hf
from dma_lightning.cli.init import init
from dma_lightning.cli.lightning_cli import DMACLI, ConfigOfRun
from dma_lightning.cli.lora import export_lora, merge_lora
from dma_lightning.cli.needle import needle
from dma_lightning.cli.parsing import Parser, set_up_parsing
from dma_lightning.cli.positions import positions
from dma_lightning.cli.prepare import prepare
from dma_lightning.cli.sizes import sizes
from dma_lightning.cli.train_tokenizer import train_tokenizer
from dma_lightning.closest import did_you_mean
from dma_lightning.data import SequenceDataModule
from dma_lightning.language_model import LanguageModel

_COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "generate": generate,
    "prepare": prepare,
    "train-tokenizer": train_tokenizer,
    "sizes": sizes,
    "needle": needle,
    "extrapolation": extrapolation,
    "positions": positions,
    "evaluate": evaluate,
    "import-hf": import_hf,
    "export-hf": export_hf,
    "merge-lora": merge_lora,
    "export-lora": export_lora,
}

# Flags that print something without running anything.
_ABOUT = ("-h", "--help", "--version", "--print_completion")


class _AllCommands(DMACLI):
    """The command line with Lightning's and our commands, for help and completion; ours run without it."""

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        assert isinstance(self.parser, Parser)
        for name, command in _COMMANDS.items():
            self.parser.add_shown(name, auto_parser(command, **_options_of(name)))


def build_cli(args: ArgsType = None, run: bool = True) -> DMACLI:
    """Parse arguments (by default the command line's), build trainer, model and data, and run the subcommand.

    Args:
        args: a list of arguments, or a nested dictionary.
        run: if False, `args` have no subcommand, and nothing is run.
    """
    given = sys.argv[1:] if args is None else args
    name = given[0].partition("=")[0] if run and isinstance(given, list) and given else ""
    set_up_parsing(completion=name in _ABOUT)
    return (_AllCommands if name in _ABOUT else _with_parser_of(name))(
        LanguageModel,
        SequenceDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=ConfigOfRun,
        trainer_defaults={"enable_model_summary": False},  # RunSummary prints more
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={
            "prog": "dma-lightning",
            "description": "Train and evaluate language models with dynamic mask attention.",
            "version": __version__,
        },
        args=args,
        run=run,
    )


def _with_parser_of(name: str) -> type[DMACLI]:
    """The command line with only this subcommand, because parsers are slow to build; with all if there is none."""
    named = {key: value for key, value in DMACLI.subcommands().items() if key == name}

    class OneCommand(DMACLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return named

    return OneCommand if named else DMACLI


def main() -> None:
    """Run the console script; `errors` and `usage` handle its errors."""
    name, *args = sys.argv[1:] or [""]
    commands = [*DMACLI.subcommands(), *_COMMANDS]
    if name not in commands and not name.startswith("-"):
        meant = did_you_mean(name, commands)
        print(
            f"dma-lightning: expected a command of {', '.join(commands)}, got {name!r}{meant or '; see --help'}",
            file=sys.stderr,
        )
        sys.exit(2)
    prog = f"dma-lightning {name}"
    with told_errors(prog, own=name in _COMMANDS):
        if name not in _COMMANDS:
            build_cli()
            return
        set_up_parsing()
        auto_cli(_COMMANDS[name], args=args, prog=prog, **_options_of(name))


def _options_of(name: str) -> dict[str, Any]:
    """Options for a command's parser; its description comes from the command."""
    as_positional = name not in ("generate", "evaluate")
    return {"as_positional": as_positional, "parser_class": Parser, "description": None, "allow_abbrev": False}
