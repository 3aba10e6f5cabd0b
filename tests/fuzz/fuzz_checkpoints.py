"""Damaged and hostile checkpoints: changed bytes, changed values, and what a resumed run does with them."""

import contextlib
import copy
import io
import logging
import os
import pickle
import random
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fuzz_contract import check_reading, new_folder, place
from fuzz_mutations import CLASSES, SENTINEL, change_bytes, change_file, change_value, draw_value, strings
from fuzz_prepared import source
from fuzz_told import told

from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from dma_lightning.cli import build_cli
from dma_lightning.cli.ckpt_path import open_ckpt_path, saved_defaults
from dma_lightning.data import TextDataModule
from dma_lightning.language_model import LanguageModel
from dma_lightning.trained_models import load_checkpoint, tokenizer_of

_MODEL = {
    "max_position_embeddings": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "keep_window_size": 4, "bytes_per_token": 1.0,
    "schedule": "constant", "head_dim": 4,
}  # fmt: skip
_ARGUMENTS = ("hyper_parameters", "datamodule_hyper_parameters")


def _data(cache_dir: Path, **changed: Any) -> TextDataModule:
    options = {"sequence_length": 16, "batch_size": 4, "cache_dir": str(cache_dir)}
    return TextDataModule(str(source() / "plain.txt"), **options | changed)


def _trainer(folder: Path, steps: int, monitor: bool = False) -> pl.Trainer:
    figures = {"monitor": "val/loss", "save_top_k": 2} if monitor else {}
    saver = ResumableCheckpoint(dirpath=str(folder), every_n_train_steps=1, **figures)
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        callbacks=[saver], limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=0, inference_mode=False,
        plugins=AtomicCheckpointIO(),
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Any:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@cache
def whole(monitor: bool = False) -> tuple[Path, dict[str, Any]]:
    """The path and the content of an intact checkpoint after two steps, in the folder of its run."""
    run = place().root / f"run-{monitor}"
    with _quiet():
        _trainer(run, 2, monitor).fit(LanguageModel(**_MODEL), _data(place().root / "cache"))
    path = (run / "last.ckpt").resolve()
    return path, torch.load(path, weights_only=True)


def check_bytes(seed: int) -> None:
    """Changed bytes: reading returns what was written, or refuses the file."""
    rng = random.Random(seed)
    path, saved = whole()
    with new_folder() as folder:
        file = folder / "step=2.ckpt"
        file.write_bytes(path.read_bytes())
        words = _change_entry(rng, file) if rng.random() < 0.4 else change_file(rng, file)

        def right(found: dict[str, Any]) -> None:
            assert same(found, saved), "changed content is accepted"

        def right_model(module: LanguageModel) -> None:
            assert same(dict(module.state_dict()), saved["state_dict"]), "changed weights are accepted"
            kept = {name: value for name, value in saved["hyper_parameters"].items() if not name.startswith("_")}
            assert same({name: module.hparams[name] for name in kept}, kept), "changed arguments are accepted"

        with told(seed, words):
            if rng.random() < 0.5:
                check_reading(lambda: read_checkpoint(file), right, folder, [file.name])
            else:
                check_reading(lambda: _loaded(rng, file), right_model, folder, [file.name])


def check_values(seed: int) -> None:
    """Changed values, such as class paths and names of other people's files.

    Reading returns plain values of known fields, or refuses the file.
    """
    rng = random.Random(seed)
    _, saved = whole()
    with new_folder() as folder:
        file = folder / "step=2.ckpt"
        changed, words = _changed(rng, saved)
        if rng.random() < 0.05:
            _save_pickle(rng, file)
            words = "a pickle that runs code"
        else:
            torch.save(changed, file)
        kind = rng.choice(("model", "model", "arguments", "tokenizer"))

        def read() -> Any:
            if kind == "arguments":
                return _defaults(file)
            module = _loaded(rng, file)
            return (module, tokenizer_of(module, file)) if kind == "tokenizer" else module

        def right(found: Any) -> None:
            if kind == "arguments":
                _assert_plain(found)
                return
            module = found[0] if kind == "tokenizer" else found
            assert type(module) is LanguageModel
            assert same(dict(module.state_dict()), changed["state_dict"]), "weights differ from those in the file"
            _assert_plain(dict(module.hparams))
            if not module.hparams.compile_layers:  # compiling takes long
                with torch.no_grad():
                    module(torch.arange(4)[None])

        with told(seed, f"{kind}, {words}"):
            check_reading(read, right, folder, [file.name])


def check_resuming(seed: int) -> None:
    """`fit` from a checkpoint with changed callback states changes nothing outside the run's folder."""
    rng = random.Random(seed)
    monitor = rng.random() < 0.5
    path, saved = whole(monitor)
    with new_folder() as root:
        run = root / "run"
        run.mkdir()
        saved = _in_folder(saved, str(path.parent), str(run))
        state = next(state for name, state in saved["callbacks"].items() if "Checkpoint" in name)
        words = []
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(sorted(state))
            state[name] = _hostile_state(rng, state[name], run)
            words.append(f"{name} = {state[name]!r}")
        if rng.random() < 0.2:
            saved["callbacks"], more = change_value(rng, saved["callbacks"])
            words.append(more)
        file = run / "step=2.ckpt"
        torch.save(saved, file)

        def resume() -> pl.Trainer:
            with _quiet():
                trainer = _trainer(run, 4, monitor)
                trainer.fit(LanguageModel(**_MODEL), _data(place().root / "cache"), ckpt_path=str(file))
            return trainer

        def right(trainer: pl.Trainer) -> None:
            assert trainer.global_step == 4
            left = [found for found in root.rglob("*") if found.name != "run" and not _is_ours(found, run)]
            assert not left, f"unexpected files: {left}"

        with told(seed, f"monitor {monitor}, {'; '.join(words)}"):
            check_reading(resume, right, run, [file.name, "ckpt_path", *sorted(state), "callbacks"])


def check_commands(seed: int) -> None:
    """`validate` on the command line, which takes its defaults from the checkpoint."""
    rng = random.Random(seed)
    _, saved = whole()
    with new_folder() as folder:
        file = folder / "step=2.ckpt"
        changed, words = _changed(rng, saved)
        torch.save(changed, file)
        options = ["--ckpt_path", str(file), "--trainer.logger=false", "--trainer.limit_val_batches=1"]
        options += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
        if rng.random() < 0.5:
            options += ["--data=TextDataModule", f"--data.path={source() / 'plain.txt'}"]
            options += [f"--data.cache_dir={place().root / 'cache'}", "--data.sequence_length=16"]

        def validate() -> None:
            errors = io.StringIO()
            try:
                with _quiet(), contextlib.redirect_stderr(errors):
                    build_cli(["validate", *options])
            except SystemExit as error:  # from the parser, which has printed the reason
                *_, last = errors.getvalue().strip().splitlines()
                raise ValueError(f"{last} {file.name}") from error  # its messages about options need not name the file

        with told(seed, words):
            check_reading(validate, lambda _: None, folder, [file.name, "ckpt_path", "--data"])


def same(found: Any, expected: Any) -> bool:
    """Whether values are equal to the last bit, and of the same types."""
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.dtype == expected.dtype and _bits(found) == _bits(expected)
    if isinstance(expected, dict):
        return isinstance(found, dict) and found.keys() == expected.keys() and all(
            same(found[name], value) for name, value in expected.items()
        )  # fmt: skip
    if isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=True) if len(found) == len(expected) else [(0, 1)]
        return type(found) is type(expected) and all(same(x, y) for x, y in pairs)
    return type(found) is type(expected) and repr(found) == repr(expected)


def _bits(x: torch.Tensor) -> tuple[list[int], bytes]:
    return list(x.shape), x.detach().contiguous().numpy().tobytes()


def _loaded(rng: random.Random, file: Path) -> LanguageModel:
    """The model, loaded in one of two ways."""
    with _quiet():
        if rng.random() < 0.5:
            return load_checkpoint(file, "cpu")
        return LanguageModel.load_from_checkpoint(file, map_location="cpu", weights_only=True)


def _defaults(file: Path) -> dict[str, Any]:
    """What the command line takes from a checkpoint."""
    return saved_defaults(open_ckpt_path(str(file)))


def _change_entry(rng: random.Random, file: Path) -> str:
    """Change the data of one entry of the archive, so that only its checksum is wrong, or some of its headers."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        info = rng.choice(infos)
        data = archive.read(info)
    content, at = bytearray(file.read_bytes()), info.header_offset + 30
    if not data or rng.random() < 0.2:  # change a header instead
        at = rng.choice((info.header_offset, content.rfind(b"PK\x01\x02"), content.rfind(b"PK\x05\x06")))
        content[at + rng.randrange(22)] ^= 1 << rng.randrange(8)
        words = "headers"
    else:
        start = content.find(data, at)
        changed, words = change_bytes(rng, data)
        content[start : start + len(data)] = changed[: len(data)].ljust(len(data), b"\0")
    file.write_bytes(bytes(content))
    return f"{info.filename}: {words}"


def _changed(rng: random.Random, saved: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A copy in which one part differs, mostly an argument, and what was changed."""
    changed = copy.deepcopy(saved)
    part = rng.choice((*_ARGUMENTS, *_ARGUMENTS, *_ARGUMENTS, *sorted(saved)))
    kind = rng.choice(("value", "class", "class", "path", "data class", "state"))
    if part in _ARGUMENTS and kind == "class":
        name = rng.choice((*sorted(changed[part]), "attention_args"))
        value = copy.deepcopy(rng.choice(CLASSES))
        changed[part][name] = rng.choice((value, [value], {"x": value}, {"x": [value]}))
    elif kind == "path":
        part, name = "datamodule_hyper_parameters", rng.choice(("path", "cache_dir", "tokenizer"))
        changed[part][name] = rng.choice(strings())
    elif kind == "data class":
        part, name = "datamodule_hyper_parameters", "_class_path"
        names = (
            f"{SENTINEL}.Data",
            SENTINEL,
            "subprocess.Popen",
            "os.system",
            "my_project.Data",
            "",
            "torch.nn.Linear",
        )
        changed[part][name] = rng.choice(names)
    elif kind == "state":
        part, name = "state_dict", rng.choice(sorted(changed["state_dict"]))
        x = changed[part][name]
        changed[part][name] = rng.choice((x[..., :1], x.long(), x[None], None, "x", x.bool(), x.expand(2, *x.shape)))
    else:
        changed[part], words = change_value(rng, changed[part])
        return changed, f"{part}: {words}"
    return changed, f"{part}: {name} = {str(changed[part][name])[:100]}"


def _save_pickle(rng: random.Random, file: Path) -> None:
    """Write a pickle that runs a command if it is loaded without restrictions."""

    class Command:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, ("true",)

    if rng.random() < 0.5:
        torch.save({"state_dict": Command()}, file)
    else:
        file.write_bytes(pickle.dumps({"state_dict": Command()}))


def _assert_plain(value: Any) -> None:
    """Check that a parser would make no object of this value, except a data class of this package."""
    if isinstance(value, dict):
        known = {"class_path", "init_args"} & value.keys()
        if known:
            assert str(value.get("class_path")).startswith("dma_lightning."), f"a class path is passed on: {value}"
        for x in value.values():
            _assert_plain(x)
    elif isinstance(value, list | tuple):
        for x in value:
            _assert_plain(x)
    else:
        assert value is None or isinstance(value, bool | int | float | str), f"{value!r} is not a plain value"


def _in_folder(value: Any, old: str, new: str) -> Any:
    """A copy in which paths below folder `old` are below `new` instead."""
    if isinstance(value, dict):
        return {_in_folder(key, old, new): _in_folder(x, old, new) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_in_folder(x, old, new) for x in value)
    return value.replace(old, new) if isinstance(value, str) else value


def _hostile_state(rng: random.Random, value: Any, run: Path) -> Any:
    """Names of other people's files in place of the run's own, direct or by a detour such as `..`."""
    victim = place().victim
    detour = os.path.relpath(victim, run)
    names = (str(victim), f"{victim}/sub", f"{victim}/secret.txt", f"{victim}/sub/step=3.ckpt", f"{run}/{detour}/sub")
    names += (detour, f"{run}/../../victim/sub/step=3.ckpt", str(run), "../victim", "", f"{run}/step=2.ckpt", "a\0b")
    if rng.random() < 0.2:
        return draw_value(rng)
    if isinstance(value, list):
        return rng.choices(names, k=rng.randint(0, 4))
    if isinstance(value, dict):
        return {name: torch.tensor(rng.choice((0.0, 9.0, float("nan")))) for name in rng.choices(names, k=2)}
    return rng.choice(names) if isinstance(value, str) else draw_value(rng)


def _is_ours(path: Path, run: Path) -> bool:
    names = (".lock", ".lock-holder", "last.ckpt")
    return path.parent == run and (path.name in names or (path.name.startswith("step=") and path.suffix == ".ckpt"))
