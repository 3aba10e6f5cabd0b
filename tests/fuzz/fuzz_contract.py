"""What reading a damaged or hostile file may do: return exactly the right content, or fail with one line that names it.

An audit hook watches the reader and blocks everything forbidden, so even a faulty reader does no harm. The reader must
not start a process, make a connection, or import a module of the attacker. It must not open or change anything in a
folder that belongs to somebody else, called the victim here, and must not write or remove anything outside the folder
of the cases. It must not hang or use much memory.
"""

import contextlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SENTINEL = "fuzz_sentinel"  # a module that nobody has a reason to import
_SECONDS, _MEMORY = 10, 1 << 30  # limits of one reading: seconds, and bytes of additional address space
_PEAK = 300  # MiB by which one reading of small files may raise the peak memory
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
_CHANGES = ("os.remove", "os.rmdir", "os.rename", "os.truncate", "os.link", "os.symlink", "os.chmod", "os.mkdir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class HungError(BaseException):
    """Reading does not end. Not an `Exception`, so that no reader takes it for a damaged file."""


@dataclass(frozen=True)
class Place:
    """Where a case is allowed to read, and what it must leave alone."""

    root: Path

    @property
    def victim(self) -> Path:
        """A folder that belongs to somebody else."""
        return self.root / "victim"

    def content(self) -> dict[str, str | None]:
        """Names and texts of all files below the victim; for links, their targets."""
        return {
            str(file.relative_to(self.victim)): str(file.readlink())
            if file.is_symlink()
            else (file.read_text() if file.is_file() else None)
            for file in sorted(self.victim.rglob("*"))
        }


class RefusedError(BaseException):
    """The audit hook blocks an action. Not an `Exception`, for the same reason."""


@dataclass
class _Watch:
    """What the audit hook has seen since it was switched on."""

    place: Place | None = None
    may_start: bool = False
    seen: list[str] = field(default_factory=list)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Record and block what no reader has a reason to do."""
        if self.place is not None and self._is_bad(event, args):
            self.seen.append(f"{event} {str(args)[:200]}")
            raise RefusedError(self.seen[-1])

    def _is_bad(self, event: str, args: tuple[Any, ...]) -> bool:
        if event in _NETWORK or (event in _STARTS and not self.may_start):
            return True
        if event == "import":
            return str(args[0]).partition(".")[0] == SENTINEL
        if event != "open" and not event.startswith(("os.", "shutil.", "glob.")):
            return False
        paths = [_real(x) for x in args if isinstance(x, str | bytes | Path)]
        if any(path.startswith(str(self.place.victim)) for path in paths):
            return True
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & _WRITES
            return bool(writes) and not all(self._is_inside(path) or "__pycache__" in path for path in paths)
        if event == "shutil.rmtree" or (event in _CHANGES and -1 in args):  # -1: not relative to an open folder
            return not all(self._is_inside(path) for path in paths)
        return False

    def _is_inside(self, path: str) -> bool:
        return path.startswith((f"{self.place.root}/", "/dev/null", f"{tempfile.gettempdir()}/torchinductor"))


_watch = _Watch()


@cache
def place() -> Place:
    """The folders of this process. The first call installs the hook, which stays."""
    folder = tempfile.TemporaryDirectory(prefix="dma_fuzz_")
    place.folder = folder  # keeps the folder until the process ends
    found = Place(Path(folder.name).resolve())
    (found.root / "here").mkdir()
    (found.victim / "sub").mkdir(parents=True)
    (found.victim / "secret.txt").write_text("a secret " * 300)
    (found.victim / "sub" / "step=3.ckpt").write_text("precious")
    modules = found.root / "modules"
    modules.mkdir()
    (modules / f"{SENTINEL}.py").write_text("class Data:\n    pass\n")
    sys.path.append(str(modules))
    sys.addaudithook(_watch.hook)
    return found


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A folder for one case."""
    with tempfile.TemporaryDirectory(dir=place().root) as folder:
        yield Path(folder)


def check_reading(
    read: Callable[[], T], right: Callable[[T], None], folder: Path, names: list[str], may_start: bool = False
) -> None:
    """Read changed files, and check that the reader keeps to the contract.

    Args:
        read: the reader.
        right: raises `AssertionError` unless its result is what the files say.
        folder: folder of the files.
        names: names of the changed files. An error must name one of them, or the folder.
        may_start: whether the reader may start processes.
    """
    before, peak = place().content(), _peak()
    refusal = None
    try:
        with _limited(may_start):
            result = read()
    except (ValueError, OSError) as error:
        refusal = error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # including PanicException from Rust libraries, and SystemExit
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error
    assert not _watch.seen, f"the reader did something forbidden: {_watch.seen[:3]}"  # and caught the RefusedError
    assert place().content() == before, "the reader changed other people's files"
    assert _peak() - peak < _PEAK, f"the reader took {_peak() - peak} MiB"
    if refusal is None:
        right(result)
    else:
        _check_message(refusal, [*names, str(folder)])


def _check_message(error: Exception, names: list[str]) -> None:
    message = str(error)
    assert "\n" not in message.strip("\n"), f"an error with several lines: {message[:300]!r}"
    named = any(name in message for name in names)
    assert named, f"an error that names no file: {type(error).__name__}: {message[:300]}"


@contextlib.contextmanager
def _limited(may_start: bool) -> Iterator[None]:
    """Run the body with the hook on, a deadline, and a limit on additional memory."""
    _watch.place, _watch.may_start, _watch.seen = place(), may_start, []
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, limits[1]))
    handler = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        with contextlib.chdir(place().root / "here"):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        _watch.place = None


def _hang(*_: object) -> None:
    raise HungError(f"the reader had not ended after {_SECONDS} s")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _real(path: str | bytes | Path) -> str:
    """The real path of a name, but without following a link in its last part, since the link itself is replaced."""
    name = Path(os.fsdecode(path).replace("\0", ""))
    if name.name in ("", ".."):
        return os.path.realpath(name)
    return str(Path(os.path.realpath(name.parent), name.name))
