"""Our string options are taken literally, in every command. Where YAML is read, only `null` means None."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
import pytest
import small_run
import yaml
from jsonargparse import Namespace

from dma_lightning.callbacks import ContinuationWriter, FitReport, GradientGuard, MixedWindows
from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.cli.default_callbacks import add_default_callbacks
from dma_lightning.cli.entry import _COMMANDS, main
from dma_lightning.cli.parsing import Parser, set_up_parsing
from dma_lightning.config import ModelConfig
from dma_lightning.data import (
    ChatDataModule,
    PreparedDataModule,
    SequenceDataModule,
    TextDataModule,
    TextNeedleDataModule,
)
from dma_lightning.language_model import LanguageModel
from dma_lightning.strategies import FullyShardedStrategy

STRINGS = ["###", "null", "~", "# Title", "[INST]", "{a: b}", "a: b", "\n#\n", "1", "true", "'quoted'", "*", " ", "x"]
TEXT = {str: str, Path: Path, list[str]: lambda text: [text, text]}  # types of options, and what a string given means


def kind(hint: Any) -> Any:
    """A type without None, and without dictionaries of weights, which a string stands for only in braces."""
    kinds = (
        [x for x in get_args(hint) if x not in (type(None), dict[str, float])]
        if get_origin(hint) is UnionType
        else [hint]
    )
    return kinds[0] if len(kinds) == 1 else hint


def text_options(source: Callable) -> dict[str, Any]:
    """Names and types of the text options of a function, or of a class's `__init__`."""
    hints = get_type_hints(source.__init__ if inspect.isclass(source) else source)
    return {name: kind(hint) for name, hint in hints.items() if kind(hint) in TEXT and name != "return"}


def taken(command: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options that a command is called with."""
    given: dict[str, Any] = {}
    function = functools.wraps(_COMMANDS[command])(lambda **options: given.update(options))
    monkeypatch.setitem(_COMMANDS, command, function)
    monkeypatch.setattr("sys.argv", ["dma-lightning", command, *args])
    main()
    return given


@pytest.mark.parametrize("command", _COMMANDS)
def test_flags_of_commands_mean_their_characters(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = text_options(_COMMANDS[command])
    parameters = inspect.signature(_COMMANDS[command]).parameters
    required = [name for name in options if parameters[name].default is inspect.Parameter.empty]
    positional = [] if command in ("generate", "evaluate") else required
    assert options
    for text in STRINGS:
        flags = [f"--{name}={text}" for name in options if name not in positional]
        given = taken(command, [*[text for _ in positional], *flags, *flags], monkeypatch)
        assert {name: given[name] for name in options} == {name: TEXT[x](text) for name, x in options.items()}


@pytest.mark.parametrize("command", _COMMANDS)
def test_a_configuration_of_a_command_says_the_same(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = text_options(_COMMANDS[command])
    for text in STRINGS:
        content = {name: [text, text] if x == list[str] else text for name, x in options.items()}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
        given = taken(command, [f"--config={tmp_path / 'c.yaml'}"], monkeypatch)
        assert {name: given[name] for name in options} == {name: TEXT[x](text) for name, x in options.items()}


@functools.cache
def training_parser() -> Parser:
    """A parser with the options of `fit`: trainer, model, data and default callbacks."""
    set_up_parsing()
    parser = Parser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    parser.add_lightning_class_args(LanguageModel, "model")
    parser.add_lightning_class_args(SequenceDataModule, "data", subclass_mode=True, required=False)
    add_default_callbacks(parser)
    return parser


def arguments(config: Namespace, option: str) -> Namespace:
    """Arguments of the object that an option configures."""
    found = config[option]
    return (found[-1] if isinstance(found, list) else found).init_args


DATA = (TextDataModule, TextNeedleDataModule, PreparedDataModule, ChatDataModule)
CALLBACKS = (ContinuationWriter, FitReport, ResumableCheckpoint)
OPTIONS = [(option, x) for option, classes in (("data", DATA), ("trainer.callbacks", CALLBACKS)) for x in classes]
OPTIONS += [("checkpoint", ResumableCheckpoint), ("trainer.strategy", FullyShardedStrategy)]


@pytest.mark.parametrize(("option", "owner"), OPTIONS)
def test_flags_of_training_mean_their_characters(option: str, owner: type, tmp_path: Path) -> None:
    parser, names = training_parser(), list(text_options(owner))
    assert names
    chosen = f"--{option}={owner.__module__}.{owner.__qualname__}"
    for text in STRINGS:
        config = parser.parse_args([chosen, *(f"--{option}.{name}={text}" for name in names)])
        assert [arguments(config, option)[name] for name in names] == [text] * len(names)
        saved = tmp_path / "saved.yaml"
        saved.write_text(parser.dump(config))
        again = parser.parse_args([f"--config={saved}"])
        assert arguments(again, option) == arguments(config, option)
        assert all(type(arguments(again, option)[name]) is str for name in names)


def test_all_of_our_options_that_take_text_are_read_as_text() -> None:
    """So that a new one of another type, such as a dictionary of strings, is thought about."""
    owners = (*_COMMANDS.values(), *DATA, *CALLBACKS, GradientGuard, MixedWindows, LanguageModel, FullyShardedStrategy)
    hints = [get_type_hints(owner.__init__ if inspect.isclass(owner) else owner) for owner in owners]
    found = {f"{name}: {hint}" for x in (*hints, get_type_hints(ModelConfig)) for name, hint in x.items()}
    others = {x for x in found if "str" in x.split(": ", 1)[1].replace("stride", "") and "<class" not in x}
    known = {str(hint) for hint in (str | None, list[str], list[str] | None, str | dict[str, float])}
    assert {x.split(":")[0] for x in others if x.split(": ", 1)[1] not in known} == {"attention_args"}  # YAML by nature


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("{a: 0.7, b: 3}", {"a": 0.7, "b": 3.0}),
        ("{1: 1, null: 2, ~/c: 3}", {"1": 1.0, "null": 2.0, "~/c": 3.0}),
        ('{"a b": 1e-3}', {"a b": 1e-3}),
        ("{}", {}),
        ("{a:0.7}", "{a:0.7}"),
        ("{a: x}", "{a: x}"),
        ("{a, b}", "{a, b}"),
        ("{a: 1", "{a: 1"),
        ("{a: [}", "{a: [}"),
        ("{a: {b: 1}}", "{a: {b: 1}}"),
        ("a: 1", "a: 1"),
    ],
)
def test_weights_stand_in_braces(text: str, read: str | dict[str, float], tmp_path: Path) -> None:
    chosen = "--data=dma_lightning.PreparedDataModule"
    config = training_parser().parse_args([chosen, f"--data.path={text}"])
    assert config.data.init_args.path == read
    (tmp_path / "saved.yaml").write_text(training_parser().dump(config))
    again = training_parser().parse_args([f"--config={tmp_path / 'saved.yaml'}"])
    assert again.data.init_args == config.data.init_args
    other = training_parser().parse_args([f"--config={tmp_path / 'saved.yaml'}", "--data.path={other: 1}"])
    assert other.data.init_args.path == {"other": 1.0}
    assert training_parser().parse_args([chosen, "--data.path={a: 1}", "--data.path=b"]).data.init_args.path == "b"


def test_an_option_of_the_model_means_its_characters() -> None:
    names = [x.name for x in dataclasses.fields(ModelConfig) if get_type_hints(ModelConfig)[x.name] is str]
    assert "attention" in names
    for text in STRINGS:
        config = training_parser().parse_args([f"--model.{name}={text}" for name in names])
        assert [config.model[name] for name in names] == [text] * len(names)


@pytest.mark.parametrize(
    ("given", "read"), [("null", None), ("~", "~"), ("#x", "#x"), ("# Title", "# Title"), ("Null", "Null"), ("x", "x")]
)
def test_an_option_of_lightning_is_nothing_by_null_alone(given: str, read: str | None) -> None:
    flags = ["logger=TensorBoardLogger", "logger.save_dir=runs", f"logger.name={given}", f"default_root_dir={given}"]
    flags += [f"callbacks={ResumableCheckpoint.__module__}.ResumableCheckpoint", f"callbacks.monitor={given}"]
    trainer = training_parser().parse_args([f"--trainer.{flag}" for flag in flags]).trainer
    assert trainer.default_root_dir == read
    assert trainer.logger.init_args.name == read
    assert trainer.callbacks[-1].init_args.monitor == read


def test_an_option_of_lightning_stays_yaml() -> None:
    flags = ["devices=[0, 1]", "max_steps=7", "enable_progress_bar=false", "logger=TensorBoardLogger"]
    flags += ["logger.save_dir=1", "logger.version=3", "logger.sub_dir=[a]", "logger.init_args={prefix: p}"]
    trainer = training_parser().parse_args([f"--trainer.{flag}" for flag in flags]).trainer
    assert (trainer.devices, trainer.max_steps, trainer.enable_progress_bar) == ([0, 1], 7, False)
    assert (trainer.logger.init_args.version, trainer.logger.init_args.sub_dir) == (3, "[a]")
    assert trainer.logger.init_args.prefix == "p"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("", None),
        ("null", None),
        ("# Title", None),
        ("~", "~"),
        ("'null'", "null"),
        ("'# Title'", "# Title"),
        ('""', ""),
    ],
)
def test_a_file_has_the_quoting_rules_of_yaml(written: str, read: str | None, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"trainer:\n  default_root_dir: {'null' if read == 'null' else written}\n"
        f"data:\n  class_path: TextDataModule\n  init_args:\n    path: {written}\n"
    )
    config = training_parser().parse_args([f"--config={file}"])
    assert config.data.init_args.path == read
    assert config.trainer.default_root_dir == (None if read == "null" else read)


def test_flags_of_a_list_add_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text("stop: '###'\nprompt: [a, b]\n")
    config = [f"--config={tmp_path / 'c.yaml'}", "--ckpt_path=x"]
    given = taken("generate", [*config, "--stop=null", "--stop", "[x]", "--stop+", "~"], monkeypatch)
    assert given["stop"] == ["###", "null", "[x]", "~"]
    assert given["prompt"] == ["a", "b"]


def test_a_run_on_a_file_named_null_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text, and not the default corpus, is what the saved configuration and the checkpoint name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dma-lightning"])
    Path("null").write_text("alpha beta gamma delta\n" * 200)
    data = [*small_run.DATA, "--data.path=null"]
    small_run.fit("--trainer.max_steps=1", *small_run.MODEL, *data)
    saved = "runs/small/version_0/config.yaml"
    again = small_run.cli("fit", f"--config={saved}", "--ckpt_path=last", "--trainer.max_steps=2")
    assert again.datamodule.path == "null"
    assert again.trainer.global_step == 2
    checkpoint = f"{small_run.CHECKPOINTS}/last.ckpt"
    assert small_run.validate(checkpoint, "--data.path=null").datamodule.path == "null"
