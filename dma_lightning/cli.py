"""The command line: `dma-lightning fit | validate | test | predict`."""

from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dma_lightning.data import SequenceDataModule
from dma_lightning.language_model import LanguageModel


class DMACLI(LightningCLI):
    """LightningCLI whose model takes from the data what the data dictates."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that takes no abbreviated options, so that a typo is an error."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.sequence_length", "model.max_position_embeddings", apply_on="instantiate")
        parser.link_arguments("data.bytes_per_token", "model.bytes_per_token", apply_on="instantiate")


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
        parser_kwargs={"description": "Train and evaluate language models with dynamic mask attention."},
        args=args,
        run=run,
    )


def main() -> None:
    """The console script."""
    build_cli()
