"""Doge models of Hugging Face Transformers load here, and ours load there, with the same logits and text."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from chosen_form import CHOSEN
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DogeConfig
from transformers import DogeForCausalLM as HFDogeForCausalLM

from dma_lightning import DogeForCausalLM, FileTokenizer, LanguageModel, ModelConfig, load_doge, save_doge
from dma_lightning.cli import build_cli, main
from dma_lightning.huggingface.config import beyond_doge, doge_config
from dma_lightning.initial_weights import InitialWeights

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 160, "keep_window_size": 13,
}  # fmt: skip
KINDS = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 4, "attention_bias": True},
    {"num_key_value_heads": 1, "mlp_bias": True, "head_dim": 24},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 4.0}, "initializer_range": 0.05},
]


def spread(model: torch.nn.Module) -> None:
    """Change the initial weights, so that ranks differ, and norms, biases and residual weights have an effect."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            mean = 0.3 if name.endswith(".A") else 0.0 if name.endswith("bias") else 1.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.2)
        elif "dt_proj" in name:
            torch.nn.init.normal_(parameter, std=1.0)


def make_theirs(**changed: object) -> HFDogeForCausalLM:
    """A model of Transformers."""
    model = HFDogeForCausalLM(DogeConfig(**SHAPE | changed, attn_implementation="eager")).eval()
    spread(model)
    return model


def make_ours(**changed: object) -> DogeForCausalLM:
    """A model of ours."""
    model = DogeForCausalLM(ModelConfig(**SHAPE | changed))
    spread(model)
    return model.eval()


def assert_same_logits(ours: DogeForCausalLM, theirs: HFDogeForCausalLM) -> None:
    input_ids = torch.randperm(97)[None].repeat(2, 1)  # no token twice: no ties, which they break at random
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_their_models_load_here_and_ours_there(kind: dict, tmp_path: Path) -> None:
    theirs = make_theirs(**kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB" if kind == {} else "5GB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (kind == {})
    ours = load_doge(tmp_path / "theirs").eval()
    assert_same_logits(ours, theirs)
    save_doge(ours, tmp_path / "ours")
    again = HFDogeForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert_same_logits(ours, again)
    kind = {name: x for name, x in kind.items() if name != "rope_parameters"}
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    mine = {name: x for name, x in theirs.config.to_dict().items() if name in SHAPE or name in kind}
    assert mine == {name: x for name, x in again.config.to_dict().items() if name in mine}
    for (name, x), (_, y) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    assert ours.config.tie_word_embeddings == (ours.lm_head.weight is ours.embed_tokens.weight)


@pytest.mark.parametrize("eos", [7, [7, 9], None])
def test_texts_end_with_the_same_tokens(eos: int | list[int] | None, tmp_path: Path) -> None:
    make_theirs(eos_token_id=eos, bos_token_id=1).save_pretrained(tmp_path / "theirs")
    ours = load_doge(tmp_path / "theirs")
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (1, eos)
    save_doge(ours, tmp_path / "ours")
    assert DogeConfig.from_pretrained(tmp_path / "ours").eos_token_id == eos


@pytest.mark.parametrize("window", [13, 200])
def test_greedy_text_is_the_same(window: int, tmp_path: Path) -> None:
    """Theirs keeps all keys; repeated tokens tie in the first layer, so within a window logits may part there."""
    theirs = make_theirs(keep_window_size=window, vocab_size=97)
    theirs.save_pretrained(tmp_path / "model")
    ours, prompt = load_doge(tmp_path / "model"), torch.randperm(97)[None, :40]
    count = 100 if window == 200 else 20
    expected = theirs.generate(prompt, max_new_tokens=count, do_sample=False, pad_token_id=0)[:, 40:]
    assert torch.equal(ours.generate(prompt, count), expected)


def test_dynamic_scaling_is_none_within_the_training_length(tmp_path: Path) -> None:
    theirs = make_theirs(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    theirs.save_pretrained(tmp_path / "model")
    assert_same_logits(load_doge(tmp_path / "model").eval(), theirs)


def test_a_model_of_bytes_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_doge(make_ours(vocab_size=256), tmp_path / "theirs")
    command(monkeypatch, "import-hf", tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "ours/model.ckpt")
    command(monkeypatch, "generate", f"--ckpt_path={tmp_path / 'link.ckpt'}", "--prompt=a", "--max_new_tokens=3")
    with pytest.raises(ValueError, match=r"expected a checkpoint of `fit`, got .*link\.ckpt, which holds only weights"):
        build_cli(["fit", "--data=TextDataModule", f"--ckpt_path={tmp_path / 'link.ckpt'}"])
    with pytest.raises(SystemExit, match="device: expected one of this machine, got 'foo'"):
        command(monkeypatch, "generate", f"--ckpt_path={tmp_path / 'link.ckpt'}", "--prompt=a", "--device=foo")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_round_trip_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = make_theirs().to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    command(monkeypatch, "import-hf", tmp_path / "theirs", tmp_path / "ours")
    command(monkeypatch, "export-hf", tmp_path / "ours/model.ckpt", tmp_path / "again")
    before, after = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("theirs", "again"))
    assert {x.dtype for x in after.values()} == {dtype}
    torch.testing.assert_close(after["model.norm.weight"], before["model.norm.weight"], rtol=0, atol=0)
    assert torch.get_default_dtype() == torch.float32


def test_bfloat16_stays(tmp_path: Path) -> None:
    make_theirs().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    ours = load_doge(tmp_path / "model", backend="torch", keep_window_size=5)
    assert ours.embed_tokens.weight.dtype == torch.bfloat16
    assert (ours.config.backend, ours.config.keep_window_size) == ("torch", 5)
    save_doge(ours, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert all(x.dtype == torch.bfloat16 for x in load_file(tmp_path / "out/model.safetensors").values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_moe": True}, "mixtures of experts are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"sliding_window": 5}, "sliding_window: expected None, got 5"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0"),
        ({"model_type": "llama"}, "expected model_type 'doge', got 'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type: expected 'default', 'dynamic' or"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "rope_parameters: expected a factor for"),
        ({"rope_parameters": {"rope_theta": "1"}}, r"got `str` - at `\$\.rope_parameters\.rope_theta`"),
        ({"rope_parameters": [1]}, r"got `array` - at `\$\.rope_parameters`"),
        ({"rope_theta": 0}, r"> 0\.0 - at `\$\.rope_theta`"),
        (
            {"vocab_size": "97"},
            r"config\.json of a Doge model: Expected `int \| null`, got `str` - at `\$\.vocab_size`",
        ),
        ({"vocab_size": 97.0}, r"got `float` - at `\$\.vocab_size`"),
        ({"num_attention_heads": "4"}, r"got `str` - at `\$\.num_attention_heads`"),
        ({"num_attention_heads": True}, r"got `bool` - at `\$\.num_attention_heads`"),
        ({"num_attention_heads": 3}, r"config\.json: .*3"),
        ({"hidden_size": 2**40}, r"<= 16777216 - at `\$\.hidden_size`"),
        ({"hidden_size": 0}, r">= 1 - at `\$\.hidden_size`"),
        ({"hidden_dropout": 2}, r"config\.json: hidden_dropout: expected 0 <= p < 1, got 2"),
        ({"eos_token_id": ["a"]}, r"got `str` - at `\$\.eos_token_id\[0\]`"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
        ({"hidden_size": 32}, "weights do not match config.json: embed_tokens.weight expected"),
        (
            {"hidden_size": 2**24, "intermediate_size": 2**24},
            "weights do not match config.json: embed_tokens.weight",
        ),
        ({"num_hidden_layers": 3}, r"config\.json: num_hidden_layers: expected 2, as in the weights, got 3"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: expected 2, as in the weights, got 10000000"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changed: dict, message: str, tmp_path: Path) -> None:
    make_theirs().save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        load_doge(tmp_path / "model")


@pytest.mark.parametrize("damage", ["no config", "no weights", "truncated", "pickle", "config", "index"])
def test_damaged_files_are_told(damage: str, tmp_path: Path) -> None:
    make_theirs().save_pretrained(tmp_path / "model")
    config, weights = tmp_path / "model/config.json", tmp_path / "model/model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "pickle":
        torch.save({"a": print}, tmp_path / "model/pytorch_model.bin")
        weights.unlink()
    elif damage == "config":
        config.write_text("{")
    elif damage == "index":
        weights.unlink()
        (tmp_path / "model/model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    else:
        (config if damage == "no config" else weights).unlink()
    expected = r"expected config\.json" if "config" in damage else r"expected weights in model\.safetensors"
    with pytest.raises(ValueError, match=expected):
        load_doge(tmp_path / "model")


@pytest.mark.parametrize("changed", [{"score_form": "linear"}, {"keep_last": 2}, {"qk_norm": False}])
def test_what_doge_cannot_express_is_not_exported(changed: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        save_doge(make_ours(**changed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


BEYOND = {
    "attention": "swa", "score_form": "linear", "keep_last": 2, "sinks": 1, "wide_layers": (1,), "drift": "gate",
    "content": "input", "content_in_bias": False, "memory_heads": 0.5, "qk_norm": False,
}  # fmt: skip


@pytest.mark.parametrize("name", BEYOND)
def test_each_field_that_doge_lacks_is_told_alone(name: str) -> None:
    """Also those that no model has alone."""
    with pytest.raises(ValueError, match="expected a model that the Doge model of Transformers can") as error:
        doge_config(ModelConfig(**SHAPE | {name: BEYOND[name]}))
    (told,) = re.findall(r"got (.*); it would compute something else; write the model with its own", str(error.value))
    assert re.findall(r"(\w+) \S+ \(Doge", told) == [name]
    assert doge_config(ModelConfig(**SHAPE))["model_type"] == "doge"


def test_all_fields_that_doge_lacks_are_told_together(tmp_path: Path) -> None:
    form = CHOSEN | {"wide_layers": (1,), "wide_keep_window_size": 20}
    with pytest.raises(ValueError, match="dma-lightning export-hf") as error:
        save_doge(make_ours(**form), tmp_path / "out")
    for name in ("score_form", "drift", "content", "content_in_bias", "keep_last", "wide_layers"):
        assert re.search(rf"\b{name} {re.escape(repr(form[name]))} \(Doge: ", str(error.value))
    assert "retention" not in str(error.value)  # which only training knows
    assert not list(tmp_path.iterdir())


def test_an_imported_doge_has_the_published_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_theirs().save_pretrained(tmp_path / "theirs")
    assert not BEYOND.keys() & json.loads((tmp_path / "theirs/config.json").read_text()).keys()
    assert beyond_doge(load_doge(tmp_path / "theirs").config) == {}
    command(monkeypatch, "import-hf", tmp_path / "theirs", tmp_path / "ours")
    arguments = torch.load(tmp_path / "ours/model.ckpt", weights_only=True)["hyper_parameters"]
    assert (arguments["score_form"], arguments["drift"], arguments["keep_last"]) == ("exp", "none", 0)
    assert beyond_doge(LanguageModel.load_from_checkpoint(tmp_path / "ours/model.ckpt").model.config) == {}
    started = InitialWeights.open(str(tmp_path / "theirs"), LanguageModel)
    assert beyond_doge(LanguageModel(**started.arguments).model.config) == {}


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_ours()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_doge(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("dma_lightning.huggingface.doge.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_doge(model, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """Run `dma-lightning`."""
    monkeypatch.setattr("sys.argv", ["dma-lightning", *map(str, args)])
    main()


def write_tokenizer(path: Path, tokens: int = 97) -> None:
    """Write a tokenizer of words."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def test_commands_round_trip_with_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs/tokenizer.json")
    command(monkeypatch, "import-hf", tmp_path / "theirs", tmp_path / "ours")
    checkpoint = tmp_path / "ours/model.ckpt"
    assert capsys.readouterr().out == f"written to {checkpoint}\n"
    ours = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True).model.eval()
    assert_same_logits(ours, theirs)

    command(
        monkeypatch, "generate", f"--ckpt_path={checkpoint}", "--prompt=w3 w5", "--max_new_tokens=6", "--temperature=0"
    )
    tokens = ours.generate(torch.tensor([[3, 5]]), 6)[0].tolist()
    assert capsys.readouterr().out.replace(" ", "") == "w3w5" + "".join(f"w{token}" for token in tokens) + "\n"

    command(monkeypatch, "export-hf", checkpoint, tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_text() == (tmp_path / "theirs/tokenizer.json").read_text()
    again = HFDogeForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    assert_same_logits(ours, again)
    for name in ("import-hf", "export-hf"):
        with pytest.raises(SystemExit, match=f"dma-lightning {name}: .*expected a new or empty folder"):
            command(monkeypatch, name, tmp_path / "theirs" if name == "import-hf" else checkpoint, tmp_path / "again")
    with pytest.raises(SystemExit, match=r"dma-lightning import-hf: .*config"):
        command(monkeypatch, "import-hf", tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(SystemExit, match=r"dma-lightning export-hf: .*expected a checkpoint file"):
        command(monkeypatch, "export-hf", tmp_path / "nowhere.ckpt", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_without_a_fitting_tokenizer_makes_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_theirs().save_pretrained(tmp_path / "theirs")
    command(monkeypatch, "import-hf", tmp_path / "theirs", tmp_path / "ours")
    arguments = ("generate", f"--ckpt_path={tmp_path / 'ours/model.ckpt'}", "--prompt=w1")
    with pytest.raises(SystemExit, match=r"with a tokenizer\.json beside the checkpoint"):
        command(monkeypatch, *arguments)
    write_tokenizer(tmp_path / "ours/tokenizer.json", 98)
    with pytest.raises(SystemExit, match="expected at most the 97 tokens of the model, got 98"):
        command(monkeypatch, *arguments)
    (tmp_path / "ours/tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"expected a tokenizer\.json of the library tokenizers"):
        command(monkeypatch, *arguments)


def test_an_imported_checkpoint_can_be_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_theirs(vocab_size=256).save_pretrained(tmp_path / "theirs")
    command(monkeypatch, "import-hf", tmp_path / "theirs", tmp_path / "ours")
    cli = build_cli(
        ["validate", f"--ckpt_path={tmp_path / 'ours/model.ckpt'}", "--data=TextDataModule",
         "--data.sequence_length=64", f"--data.cache_dir={tmp_path}", "--trainer.accelerator=cpu",
         "--trainer.logger=false", "--trainer.limit_val_batches=2"]
    )  # fmt: skip
    assert cli.trainer.callback_metrics["val/bits_per_byte"] > 0


def test_tokens_of_a_file_become_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.encode("w3 w96 w3")) == (97, [3, 96, 3])
    assert "".join(tokenizer.decode_stream([3, 96])) == "w3 w96"


def test_weights_are_named_as_theirs(tmp_path: Path) -> None:
    for tied in (False, True):
        save_doge(make_ours(tie_word_embeddings=tied), tmp_path / f"{tied}")
        names = set(load_file(tmp_path / f"{tied}/model.safetensors"))
        theirs = set(make_theirs(tie_word_embeddings=tied).state_dict())
        assert names == theirs - ({"lm_head.weight"} if tied else set())
    weights = tmp_path / "True/model.safetensors"
    save_file(load_file(weights) | {"a": torch.zeros(2)}, weights)
    (tmp_path / "True/SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="a expected none, got"):
        load_doge(tmp_path / "True")


def test_a_checkpoint_carries_the_tokenizer_of_its_text_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4 w5\n" * 200)
    cli = build_cli(
        ["fit", "--data=TextDataModule", f"--data.path={tmp_path / 'a.txt'}", "--data.sequence_length=16",
         f"--data.tokenizer={tmp_path / 'tokenizer.json'}", f"--data.cache_dir={tmp_path}", "--model.hidden_size=32",
         "--model.num_hidden_layers=1", "--model.keep_window_size=8", "--trainer.max_steps=3",
         "--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    )  # fmt: skip
    checkpoint = Path(cli.trainer.checkpoint_callback.best_model_path)
    tokenizer = tmp_path / "tokenizer.json"
    saved, text = tokenizer.read_text(), ["validate", f"--ckpt_path={checkpoint}", "--trainer.logger=false"]
    monkeypatch.chdir(tmp_path)
    tokenizer.write_text(saved.replace('"w5": 5', '"w6": 5').replace('"w6": 6', '"w5": 6'))
    with pytest.raises(ValueError, match="expected the one that the checkpoint was trained with"):
        build_cli(text)
    tokenizer.unlink()
    capsys.readouterr()
    command(monkeypatch, "generate", f"--ckpt_path={checkpoint}", "--prompt=w1 w2", "--max_new_tokens=4")
    assert len(capsys.readouterr().out.split()) >= 2
    command(monkeypatch, "export-hf", checkpoint, tmp_path / "out")
    assert FileTokenizer(tmp_path / "out/tokenizer.json").encode("w1 w2") == [1, 2]
    assert HFDogeForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 97


def test_nothing_is_built_before_sizes_are_compared(tmp_path: Path) -> None:
    make_theirs().save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    for changed in ({"num_hidden_layers": 10**7}, {"vocab_size": 2**24, "hidden_size": 2**24}):
        path.write_text(json.dumps(config | changed))
        start = time.perf_counter()
        with pytest.raises(ValueError, match=r"config\.json"):
            load_doge(tmp_path / "model")
        assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "expected weights in .*Expected `object`, got `array`"),
        ("{}", "missing required field `weight_map`"),
        ('{"weight_map": []}', r"got `array` - at `\$\.weight_map`"),
        ('{"weight_map": {"a": 1}}', r"got `int` - at `\$\.weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"matching regex .* at `\$\.weight_map"),
        ('{"weight_map": {"a": "/etc/passwd"}}', r"matching regex .* at `\$\.weight_map"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors: expected weights in .* got no such file"),
        ("[" * 100_000, r"index\.json: expected weights in"),
        ('{"weight_map": \xff}', r"index\.json: expected weights in"),
    ],
    ids=range(9),
)
def test_a_damaged_index_is_told_in_one_line(index: str, message: str, tmp_path: Path) -> None:
    make_theirs().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as told:
        load_doge(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "merges.txt", "SHA256SUMS"])
def test_what_is_no_regular_file_is_refused_at_once(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_doge(make_ours(), tmp_path / "model")
    path = tmp_path / "model" / name
    (tmp_path / "model/SHA256SUMS").unlink()
    path.unlink(missing_ok=True)
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(SystemExit, match=rf"{name}: expected .*, got something that is not a regular file"):
        command(monkeypatch, "import-hf", tmp_path / "model", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_links_lead_to_files_of_the_folder_or_of_the_hub_s_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, blobs = tmp_path / "cache/snapshots/abc", tmp_path / "cache/blobs"
    save_doge(make_ours(), snapshot)
    blobs.mkdir()
    write_tokenizer(blobs / "123")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    (snapshot / "added_tokens.json").symlink_to("tokenizer.json")
    command(monkeypatch, "import-hf", snapshot, tmp_path / "new")
    assert (tmp_path / "new/added_tokens.json").read_text() == (blobs / "123").read_text()
    assert not (tmp_path / "new/added_tokens.json").is_symlink()
    shutil.copytree(snapshot, tmp_path / "elsewhere", symlinks=True)
    for target in (blobs / "123", tmp_path / "nowhere"):
        (tmp_path / "elsewhere/tokenizer.json").unlink()
        (tmp_path / "elsewhere/tokenizer.json").symlink_to(target)
        with pytest.raises(
            SystemExit, match=r"tokenizer\.json: expected a .*, got (a link to .*blobs/123|no such file)"
        ):
            command(monkeypatch, "import-hf", tmp_path / "elsewhere", tmp_path / "other")


def test_hashes_of_an_export_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer/tokenizer.json")
    folder = tmp_path / "out"
    save_doge(make_ours(), folder, tmp_path / "tokenizer")
    sums = folder / "SHA256SUMS"
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    lines = sums.read_text().splitlines(keepends=True)
    assert [line[66:-1] for line in lines] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    (folder / "README.md").write_text("not listed")
    load_doge(folder)

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected content .* or delete its line there if"):
        load_doge(folder)
    monkeypatch.setenv("DMA_VERIFY_FILES", "0")
    load_doge(folder)
    monkeypatch.delenv("DMA_VERIFY_FILES")
    sums.write_text(lines[0] + lines[2])
    load_doge(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected the file that SHA256SUMS lists, got no such file"):
        load_doge(folder)


@pytest.mark.parametrize("line", ["", "abc", "0" * 64 + "  ../config.json", "0" * 64 + "  /etc/passwd", "\ufffd"])
def test_a_damaged_list_of_hashes_is_told(line: str, tmp_path: Path) -> None:
    save_doge(make_ours(), tmp_path / "out")
    with (tmp_path / "out/SHA256SUMS").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="SHA256SUMS: line 3: expected a SHA-256 hash and a plain file name, got"):
        load_doge(tmp_path / "out")


def test_an_import_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_doge(make_ours(), tmp_path / "out")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink())))
    command(monkeypatch, "import-hf", tmp_path / "out", tmp_path / "new")
    *files, folder = synced
    assert folder == str(tmp_path)
    assert any(".new." in file and file.endswith("/model.ckpt") for file in files)
