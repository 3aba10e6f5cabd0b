"""`python -m benchmarks.evidence run | report`."""

import argparse
import math
import sys
from pathlib import Path

from benchmarks.evidence.results import RESULTS
from benchmarks.evidence.runs import Runner
from benchmarks.evidence.studies import STUDIES, read_study


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description="Compare many trainings.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run missing trainings, side by side on all visible GPUs or the CPU")
    report = commands.add_parser("report", help="write tables and plots of all results so far")
    own = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
    for command in (run, report):
        command.add_argument("study", help=f"{own}, or a path")
        command.add_argument("--results", type=Path, help="default: benchmarks/results/evidence/STUDY.json")
    run.add_argument("--parallel", type=int, default=8, help="largest number of trainings at once (default: 8)")
    run.add_argument("--deadline", type=float, default=math.inf, help="seconds after which all trainings have stopped")
    run.add_argument("--only", default="", help="text that cells' names must contain, such as 'mqar'")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="value of $NAME in the study")
    run.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder for the runs")
    report.add_argument("--out", type=Path, help="folder for report.md and plots (default: STUDY beside the results)")
    return parser


def main() -> int:
    """The command line. Returns 0 if nothing is missing."""
    args = _parser().parse_args()
    try:
        name, study = read_study(args.study)
        results = args.results or RESULTS / f"{name}.json"
        if args.command == "report":
            from benchmarks.evidence.report import write_report  # here: runs do not need its libraries

            print(write_report(study, results, args.out or results.with_suffix("")))
            return 0
        if wrong := [pair for pair in args.set if "=" not in pair]:
            raise ValueError(f"set: expected NAME=VALUE, got {wrong}")
        variables = dict(pair.split("=", 1) for pair in args.set)
        runner = Runner(study, args.runs / name, results, variables, args.parallel, args.deadline, args.only)
        return 0 if runner.run() else 1
    except ValueError as error:
        sys.exit(f"python -m benchmarks.evidence {args.command}: {error}")


if __name__ == "__main__":
    sys.exit(main())
