"""Changes to files: their bytes, JSON values or text, or something else in place of the file."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_contract import SENTINEL, place

NUMBERS = (-1, 0, 1, 2, 3, 10**7, 2**31, 2**40, 2**63, -(2**63), 10**30, 0.5, 1e308, -0.0, float("nan"), float("inf"))
CLASSES = (
    {"class_path": f"{SENTINEL}.Data"},
    {"class_path": f"{SENTINEL}.Data", "init_args": {}},
    {"class_path": "subprocess.Popen", "init_args": {"args": "true", "shell": True}},
    {"class_path": "os.system", "init_args": {"command": "true"}},
    {"class_path": "pathlib.Path", "init_args": {}},
    {"class_path": "torch.nn.Linear", "init_args": {"in_features": 10**6, "out_features": 10**6}},
    {"class_path": "lightning.pytorch.Trainer", "init_args": {"default_root_dir": "victim"}},
)


def strings() -> list[str]:
    """Strings that name other people's files, and odd ones."""
    victim = str(place().victim)
    names = [victim, f"{victim}/secret.txt", "../victim/secret.txt", "..", ".", "", "/dev/zero", "a\0b", "\ud800"]
    return [*names, "x" * 300, "float32", "int8", "O", "1", "ü", f"{SENTINEL}.Data", "file:///etc/passwd"]


def draw_value(rng: random.Random) -> Any:
    """A value of any type."""
    simple = (None, True, False, [], {}, [[]], {"": {}}, [1, "a", None], [-1] * 50, [2**40, 0])
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(strings())
    return copy.deepcopy(rng.choice(CLASSES if kind == 2 else simple))


def places_of(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """All (container, key) pairs in nested dictionaries and lists."""
    found = [] if found is None else found
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        places_of(value[key], found)
    return found


def change_value(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A copy with one place changed, and what was changed."""
    value = copy.deepcopy(value)
    places = places_of(value)
    if not places or rng.random() < 0.03:
        return draw_value(rng), "the whole"
    inside, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "replace", "remove", "rename", "retype", "swap", "add", "repeat"))
    if kind == "remove":
        del inside[key]
    elif kind == "rename" and isinstance(inside, dict):
        inside[rng.choice((f"{key}x", str(key).upper(), ""))] = inside.pop(key)
    elif kind == "retype":
        inside[key] = _retyped(rng, inside[key])
    elif kind == "swap":
        other, at = rng.choice(places)
        inside[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(inside[key])
    elif kind == "add" and isinstance(inside, dict):
        inside[rng.choice(("a_new_field", "class_path", "__class__", "init_args"))] = draw_value(rng)
    elif kind == "repeat" and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[key]))
    else:
        inside[key] = draw_value(rng)
    return value, f"{kind} {key!r}"


def _retyped(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return rng.choice((int(value), str(value)))
    if isinstance(value, int | float):
        return rng.choice((str(value), -value, value + 1, value - 1, [value], value * 1.5, bool(value), None))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), f"../{value}", f"/{value}", [value], len(value)))
    return rng.choice((str(value), None, [value], {"x": value}))


def change_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """JSON with a changed value, or broken JSON; and what was changed."""
    if rng.random() < 0.8:
        value, words = change_value(rng, json.loads(data))
        return json.dumps(value).encode("utf-8", "surrogatepass"), words
    text = rng.choice((
        b"", b"[]", b"null", b"{", b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, data + b"x", data * 2,
        b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000, data.replace(b"1", b"9" * 5000),
        data.replace(b":", b": NaN, ", 1), data.replace(b'"', b"'"), b"\0" * 1000,
        data.replace(b"{", b'{"tokens": 1,', 1),
    ))  # fmt: skip
    return (text, "text") if rng.random() < 0.5 else change_bytes(rng, data)


def change_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Other bytes."""
    kind, at, size = (
        rng.choice(("flip", "flip", "flip", "cut", "grow", "zero", "drop", "repeat", "empty")),
        0,
        len(data),
    )
    if not data:
        return b"\0" * rng.randint(1, 100), "grow"
    at, count, changed = rng.randrange(size), rng.choice((1, 2, 8, 64, rng.randint(1, size))), bytearray(data)
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 1, 8))):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind in ("cut", "empty"):
        del changed[at if kind == "cut" else 0 :]
    elif kind == "grow":
        changed += rng.randbytes(count) if rng.random() < 0.5 else b"\0" * count
    elif kind == "zero":
        changed[at : at + count] = b"\0" * len(changed[at : at + count])
    elif kind == "drop":
        del changed[at : at + count]
    else:
        changed[at:at] = changed[at : at + count]
    return bytes(changed), f"{kind} at {at} of {size}"


def _replacements() -> dict[str, Callable[[Path], None]]:
    victim = place().victim
    return {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "link to another user's file": lambda path: path.symlink_to(victim / "secret.txt"),
        "link to another user's folder": lambda path: path.symlink_to(victim),
        "link to nowhere": lambda path: path.symlink_to(victim / "none"),
        "link to itself": lambda path: path.symlink_to(path),
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "nothing": lambda path: None,
    }


def change_file(rng: random.Random, path: Path, nodes: float = 0.12) -> str:
    """Change the content of a file, or replace it by something else with probability `nodes`.

    Returns:
        What was changed, in words.
    """
    if rng.random() < nodes:
        kind, replacement = rng.choice(sorted(_replacements().items()))
        path.unlink()
        replacement(path)
        return f"{path.name}: {kind}"
    others = [file for file in sorted(path.parent.iterdir()) if file.is_file() and file != path]
    if others and rng.random() < 0.05:
        other = rng.choice(others)
        shutil.copyfile(other, path)
        return f"{path.name}: content of {other.name}"
    change = change_json if path.suffix == ".json" and path.stat().st_size else change_bytes
    data, words = change(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {words}"
