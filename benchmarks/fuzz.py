"""Try thousands of drawn cases: the mathematics against its definitions, and readers against damaged and hostile files.

    python benchmarks/fuzz.py                                            # all areas, 1000 cases
    python benchmarks/fuzz.py selection key_caches --cases 10000 --processes 2
    python benchmarks/fuzz.py all drift=10000 --cases 2000               # all areas, with more cases of one
    python benchmarks/fuzz.py exports --first 4711 --cases 1             # repeat one case

The checks are in `tests/fuzz`. Each takes a seed and draws a case from it. Computed results are compared with an oracle
in plain Python and NumPy that shares no code with the packages. The areas:

- `selection`: `Lifetimes.top_w` with ties, NaN, infinities, documents, padding, and first and last keys that are always
  kept; its counts of keys; and the slots of segments, where each visible pair must appear exactly once;
- `drift`: ranks with a drift, from contents and steps in nats, and integer ranks, against Python's integers;
- `masks`, `intervals`: unions and intersections of masks; block masks, also against torch's `create_block_mask`;
- `backends`, `triton`, `flex`: output and gradients of attention against softmax in float64 (`flex`: output only);
- `gates`: output and all gradients of heads with a drift, including those of gates, contents and the layer's input,
  against formulas in float64;
- `retention`, `retention_triton`: the retention loss and its gradient against formulas in float64;
- `key_caches`, `triton_caches`, `mixers`: a text that is read in arbitrary pieces, with documents, padding, and rows of
  the batch that are selected in between; the first two also with guessed tokens, some of which are rejected;
- `drift_caches`, `drift_triton_caches`: such caches of keys with a drift, which may start far into a text;
- `prepared`, `preparing`, `text`, `tokenizers`, `exports`, `checkpoint_bytes`, `checkpoint_values`: files with changed
  bytes or values, or with a pipe, a folder or a link in their place. Reading must return exactly the right content or
  fail with a one-line error that names the file. It must not hang, start a process, import foreign code, or change
  anything elsewhere;
- `resuming`, `commands`: the same for `fit` and `validate`, with checkpoints that name classes or other people's files;
- `races`: processes that write to one place at the same time, and processes that are killed.

`selection`, `drift` and the areas with `triton` in their name compute on the GPU if there is one. All others compute on
the CPU. Without a GPU, kernels run under Triton's interpreter. Areas with slow cases run only a fraction of `--cases`
(see `tests/fuzz/fuzz_areas.py`).

Cases run in separate processes. If a case crashes or hangs its process, that counts as a failure, and the run continues
with the next seed. The result is a JSON file with hardware, versions, commit and, for each area, the number of cases,
the processor time in seconds, and the seeds and messages of failures. The exit status is 1 if there were failures. All
files are made in the system's temporary folder. An audit hook blocks whatever a reader must not do, so a faulty reader
does no harm.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from harness import ROOT, CommandLine, Part, Result, Table, describe, write
from harness.tables import gpu_of

_PATIENCE = 300  # seconds that a case may take; the first in a process also makes the files that all of them change
_AT_ONCE = 25  # least number of cases that a process gets, if there are as many


@dataclass
class Tally:
    """Results of an area so far: the number of cases, their processor time, and the failures."""

    cases: int = 0
    seconds: float = 0.0
    failures: list[dict[str, int | str]] = field(default_factory=list)

    def add(self, seed: int, seconds: float, failure: str | None) -> None:
        """Count a case, and keep its failure if there is one."""
        self.cases, self.seconds = self.cases + 1, self.seconds + seconds
        if failure is not None:
            self.failures.append({"seed": seed, "failure": failure[:600]})

    def row(self) -> dict[str, object]:
        """The area's part of the result file: all failures are counted, and the first 50 are listed."""
        failed = {"failed": len(self.failures), "failures": self.failures[:50]}
        return {"cases": self.cases, "seconds": round(self.seconds, 1), **failed}


class Worker:
    """A process that checks seeds of one area in order, and reports each one.

    If the process dies, the first seed without a report is the one that killed it.
    """

    def __init__(self, area: str, seeds: list[int]) -> None:
        context = multiprocessing.get_context("spawn")  # children inherit no imported modules
        self.connection, theirs = context.Pipe()
        self.area, self.seeds, self.heard = area, seeds, time.monotonic()
        self.process = context.Process(target=_check_seeds, args=(area, seeds, theirs))
        self.process.start()
        theirs.close()

    def hear(self, tally: Tally) -> bool:
        """Read the reports of the process, and kill it if a case takes too long.

        Returns:
            Whether the process has ended.
        """
        try:
            while self.connection.poll():
                tally.add(*self.connection.recv())
                self.heard = time.monotonic()
                del self.seeds[0]
        except EOFError:
            self.process.join()
            return True
        if time.monotonic() - self.heard > _PATIENCE:
            self.process.kill()
        return False

    def rest(self, tally: Tally) -> list[int]:
        """The seeds that are left after the process has ended. The seed at which it ended counts as a failure."""
        if self.seeds:
            end = f"the process ended with status {self.process.exitcode}, or was killed after {_PATIENCE} s"
            tally.add(self.seeds[0], 0.0, end)
        return self.seeds[1:]


def run(areas: dict[str, int], first: int, processes: int) -> dict[str, Tally]:
    """Check the given number of seeds of each area, with at most `processes` processes at once."""
    tallies = {area: Tally() for area in areas}
    size = {area: max(_AT_ONCE, -(-count // processes)) for area, count in areas.items()}
    waiting = [
        (area, list(range(first + start, first + min(start + size[area], count))))
        for area, count in areas.items()
        for start in range(0, count, size[area])
    ]
    workers: list[Worker] = []
    while waiting or workers:
        while waiting and len(workers) < processes:
            workers.append(Worker(*waiting.pop(0)))
        wait([worker.connection for worker in workers], timeout=5)
        for worker in [x for x in workers if x.hear(tallies[x.area])]:
            workers.remove(worker)
            if rest := worker.rest(tallies[worker.area]):
                waiting.insert(0, (worker.area, rest))
            elif not any(x[0] == worker.area for x in [*waiting, *((y.area,) for y in workers)]):
                tally = tallies[worker.area]
                print(
                    f"{worker.area}: {tally.cases} cases, {tally.seconds:.0f} s, {len(tally.failures)} failed",
                    flush=True,
                )
    return tallies


RESULTS = ("fuzz", "gpu_fuzz")


def tables(on_cpu: Result, on_gpu: Result) -> list[Part]:
    """What the page shows: a row for each area and machine."""
    columns = ["area", "cases", "processor seconds", "failed"]
    caption = "Drawn cases by area, the time they took, and how many failed"
    return [
        Table(areas_of(on_cpu), f"{caption}, on a CPU:", columns),
        Table(areas_of(on_gpu), f"{caption}, on a GPU ({gpu_of({'environment': on_gpu})}):", columns),
    ]


def areas_of(result: Result) -> list[list[str]]:
    """A row for each area: its name, cases, seconds and failures."""
    return [
        [f"`{area}`", f"{row['cases']:,}", f"{row['seconds']:,.0f}", f"{row['failed']}"]
        for area, row in result["areas"].items()
    ]


def _check_seeds(area: str, seeds: list[int], connection: Connection) -> None:
    os.environ["RUST_BACKTRACE"] = "0"  # no backtraces of panics that are caught
    sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests")]
    import torch
    from fuzz_areas import AREAS

    torch.set_num_threads(1)
    for seed in list(seeds):
        begin, failure = time.process_time(), None
        try:
            AREAS[area].check(seed)
        except AssertionError as error:
            failure = str(error)
        connection.send((seed, time.process_time() - begin, failure))


def counts_of(asked: list[str], of_all: dict[str, int]) -> dict[str, int]:
    """Number of cases of each area that `area`, `area=cases` or `all` asks for, in the order of `of_all`.

    Raises:
        ValueError: if an argument has none of these forms.
    """
    counts = dict(of_all) if "all" in asked else {}
    for one in asked:
        name, equals, count = one.partition("=")
        if one != "all" and (name not in of_all or (equals and not count.isdecimal())):
            raise ValueError(f"expected areas of {', '.join(of_all)}, or area=cases, got {one}")
        if one != "all":
            counts[name] = int(count) if equals else of_all[name]
    return {name: counts[name] for name in of_all if name in counts}


def main() -> None:
    """The command line."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes, before they import Triton
    sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests")]
    from fuzz_areas import AREAS

    line = CommandLine(__doc__, "fuzz", duration="about five minutes on one core")
    line.add_argument(
        "areas", nargs="*", metavar="area[=cases]", default=["all"], help=f"all (the default), or {', '.join(AREAS)}"
    )
    line.add_argument("--cases", type=int, default=1000, help="per area; slow ones run a fraction (default: 1000)")
    line.add_argument("--first", type=int, default=0, help="seed of the first case (default: 0)")
    line.add_argument("--processes", type=int, default=1, help="(default: 1)")
    options = line.parse_args()
    try:
        counts = counts_of(options.areas, {name: -(-options.cases * x.share // 1000) for name, x in AREAS.items()})
    except ValueError as error:
        line.error(str(error))

    begin = time.monotonic()
    tallies = run(counts, options.first, options.processes)
    rows = {name: tally.row() for name, tally in tallies.items()}
    result = {**describe(), "first_seed": options.first, "processes": options.processes}
    result |= {
        "cases": sum(x.cases for x in tallies.values()),
        "failed": sum(len(x.failures) for x in tallies.values()),
    }
    write(options.out, result | {"wall_s": round(time.monotonic() - begin), "areas": rows})
    for name, tally in tallies.items():
        for failure in tally.failures[:5]:
            print(f"{name}: {failure['failure']}")
    print(f"written to {options.out}")
    sys.exit(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    main()
