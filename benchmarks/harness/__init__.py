"""What benchmarks share, so that each benchmark beside this folder holds little more than its method.

- `environment`: hardware, versions and commit of a run;
- `command_line`: `--help`, which says hardware and duration, and `--out`;
- `results`: result files, written after each row;
- `timing`: medians with their spread, CUDA events, CUDA graphs, peak memory, and the check before anything is timed;
- `inputs`: queries, keys, values and ranks of several kinds, and the baseline attentions;
- `tables`: how a page shows the rows of a result file;
- `training`: runs of whole models on random tokens.
"""

from .command_line import CommandLine
from .environment import ROOT, describe
from .results import CONFIGS, Result, Row, load, record, write
from .tables import Part, Picture, Table, markdown
from .timing import spread

__all__ = [
    "CONFIGS",
    "ROOT",
    "CommandLine",
    "Part",
    "Picture",
    "Result",
    "Row",
    "Table",
    "describe",
    "load",
    "markdown",
    "record",
    "spread",
    "write",
]
