"""Try thousands of drawn cases: the mathematics against its definitions, and readers against damaged and hostile files.

    python benchmarks/fuzz.py                                            # all areas, 1000 cases
    python benchmarks/fuzz.py selection key_caches --cases 10000 --processes 2
    python benchmarks/fuzz.py all drift=10000 --cases 2000               # all areas, and more cases of one
    python benchmarks/fuzz.py exports --first 4711 --cases 1             # one case again

The cases are those of `tests/fuzz`: a check takes a seed, draws a case from it, and compares with an oracle in plain
Python and NumPy that shares no code with the packages. The areas, and what one is about:

- `selection`: `Lifetimes.top_w` with ties, NaN, infinities, documents, padding, kept last and first keys; its counts;
  the slots of segments, in which each visible pair stands exactly once;
- `drift`: the same with contents and steps in nats, and with integers as ranks, against integers of Python's;
- `masks`, `intervals`: unions and intersections; block masks, also against torch's `create_block_mask`;
- `backends`, `triton`, `flex`: output and gradients against softmax in float64 (`flex` without gradients);
- `gates`: output and gradients of heads that drift, those of gates, contents and the layer's input too, against
  formulas in float64;
- `retention`, `retention_triton`: the retention loss and its gradient against formulas in float64;
- `key_caches`, `triton_caches`, `mixers`: a text cut into any calls, with guesses, chosen rows, documents and padding;
  `drift_caches`, `drift_triton_caches`: of keys that drift, also from far into a text on;
- `prepared`, `preparing`, `text`, `tokenizers`, `exports`, `checkpoint_bytes`, `checkpoint_values`: files whose bytes,
  values or kinds are others (a pipe, a folder, a link) are read with exactly the right content, or refused in one line
  that names the file; nothing hangs, starts, is imported, or changed elsewhere;
- `resuming`, `commands`: the same of `fit` and `validate` with checkpoints that name classes and others' files;
- `races`: processes that write to one place at once, and processes that are killed.

`selection`, `drift` and the areas with `triton` compute on the GPU if there is one, all others on the CPU. Without a
GPU, kernels run under Triton's interpreter. Areas whose cases take seconds try a share of `--cases` (see
`tests/fuzz/fuzz_areas.py`). Cases are run by processes of their own, so that one which ends or hangs its process is a
failure, too, and the next seed goes on. The result, a JSON file, has for each area the number of cases, seconds of one
core, and the seeds and messages of failures, beside hardware, versions and commit; the exit status is 1 if there were
failures. Files are made in the folder for temporary ones. An audit hook refuses what a reader must not do, so code that
is at fault does no harm.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from harness import ROOT, CommandLine, Part, Result, Table, describe, write
from harness.tables import gpu_of

_PATIENCE = 300  # seconds that a case may take; the first of a process makes what the others change
_AT_ONCE = 25  # cases that a process is given


@dataclass
class Tally:
    """What an area's cases have given."""

    cases: int = 0
    seconds: float = 0.0
    failures: list[dict[str, int | str]] = field(default_factory=list)

    def add(self, seed: int, seconds: float, failure: str | None) -> None:
        """Count a case, and tell of a failure."""
        self.cases, self.seconds = self.cases + 1, self.seconds + seconds
        if failure is not None:
            self.failures.append({"seed": seed, "failure": failure[:600]})

    def row(self) -> dict[str, object]:
        """For the file: failures are counted all, and the first are told."""
        failed = {"failed": len(self.failures), "failures": self.failures[:50]}
        return {"cases": self.cases, "seconds": round(self.seconds, 1), **failed}


class Worker:
    """A process that checks seeds of one area one after the other; it tells of each, so that its end tells of one."""

    def __init__(self, area: str, seeds: list[int]) -> None:
        context = multiprocessing.get_context("spawn")  # nothing is inherited that was imported before
        self.connection, theirs = context.Pipe()
        self.area, self.seeds, self.heard = area, seeds, time.monotonic()
        self.process = context.Process(target=_check_seeds, args=(area, seeds, theirs))
        self.process.start()
        theirs.close()

    def hear(self, tally: Tally) -> bool:
        """Take up what the process tells.

        Returns:
            Whether it has ended.
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
        """The seeds that it has left over; that at which it ended has failed."""
        if self.seeds:
            end = f"the process ended with status {self.process.exitcode}, or was ended after {_PATIENCE} s"
            tally.add(self.seeds[0], 0.0, end)
        return self.seeds[1:]


def run(areas: dict[str, int], first: int, processes: int) -> dict[str, Tally]:
    """Check so many seeds of each area, in processes."""
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
    columns = ["area", "cases", "seconds of a core", "failed"]
    caption = "Drawn cases by area, the time that they took, and how many failed"
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
    os.environ["RUST_BACKTRACE"] = "0"  # of panics that are caught
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
    """Cases of each area that `area`, `area=cases` or `all` asks for, in the order of all.

    Raises:
        ValueError: for what is none of these.
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
    line.add_argument("--cases", type=int, default=1000, help="of each area, or a share of it (default: 1000)")
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
