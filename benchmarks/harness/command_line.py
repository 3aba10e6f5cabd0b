"""The command line of a benchmark."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .results import RESULTS

_GPUS = {0: "a CPU", 1: "one CUDA GPU", 2: "several CUDA GPUs of one machine"}


class CommandLine(argparse.ArgumentParser):
    """A benchmark's arguments: `--help`, which says what is measured, on what and how long; `--out`; and its own.

    Args:
        doc: the benchmark's docstring: what it measures, and how.
        result: name of its result file without `.json`; `{name}` stands for the value of another argument.
        duration: about how long it takes with its defaults, and on what hardware, in words.
        gpus: how many GPUs it needs: 0, 1, or 2, which stands for all GPUs of a machine with at least two.
    """

    def __init__(self, doc: str | None, result: str, *, duration: str, gpus: int = 0) -> None:
        needs = f"Needs: {_GPUS[gpus]}.\nTakes: {duration}."
        super().__init__(
            description=f"{doc}\n{needs}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.result, self.gpus = result, gpus
        where = (RESULTS / f"{result}.json").relative_to(RESULTS.parents[1])
        self.add_argument("--out", type=Path, help=f"the result file (default: {where})")

    def add_lengths(self, lengths: Sequence[int]) -> None:
        """Add `--lengths`, the sequence lengths to measure, in tokens."""
        text = f"tokens per sequence (default: {' '.join(map(str, lengths))})"
        self.add_argument("--lengths", nargs="+", type=_tokens, default=list(lengths), metavar="N", help=text)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and clear `sys.argv`, since LightningCLI would warn about arguments that are not its own.

        Exits with status 2 and a message if the GPUs that the benchmark needs are missing.
        """
        found, rest = super().parse_known_args(args, namespace)
        if (there := torch.cuda.device_count()) < self.gpus:
            self.error(f"expected {_GPUS[self.gpus]}, got {there or 'none'}; run it on such a machine")
        found.out = found.out or RESULTS / f"{self.result.format_map(vars(found))}.json"
        sys.argv = sys.argv[:1]
        return found, rest


def _tokens(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of tokens, at least 1, got {text!r}")
    return int(text)
