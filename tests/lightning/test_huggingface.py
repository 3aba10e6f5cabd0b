"""Doge models of Hugging Face Transformers load here and ours load there, with the same logits and text."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DogeConfig
from transformers import DogeForCausalLM as HFDogeForCausalLM

from dma_lightning import DogeForCausalLM, FileTokenizer, LanguageModel, ModelConfig, load_doge, save_doge
from dma_lightning.cli import build_cli, main

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
    """Away from the initial values: ranks that differ, norms, biases and residual weights that matter."""
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
    with pytest.raises(
        ValueError, match=r"expected a checkpoint of `fit`, got .*link\.ckpt, which holds weights alone"
    ):
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
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "config.json of a Doge model: KeyError"),
        ({"rope_theta": None, "rope_parameters": None}, "config.json of a Doge model: TypeError"),
        ({"vocab_size": "97"}, "config.json of a Doge model: TypeError"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ({"hidden_size": 32}, "weights do not belong to config.json: embed_tokens.weight expected"),
        ({"num_hidden_layers": 3}, "layers.2.*expected .*, got none"),
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
        torch.save(load_file(weights), tmp_path / "model/pytorch_model.bin")
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


@pytest.mark.parametrize("changed", [{"score_form": "linear"}, {"keep_last": 2}, {"sinks": 1}])
def test_what_doge_cannot_express_is_not_exported(changed: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        save_doge(make_ours(**changed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_ours()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_doge(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("dma_lightning.huggingface.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_doge(model, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """Run `dma-lightning`."""
    monkeypatch.setattr("sys.argv", ["dma-lightning", *map(str, args)])
    main()


def write_tokenizer(path: Path, tokens: int = 97) -> None:
    """A tokenizer of words."""
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
    save_file({"a": torch.zeros(2)}, tmp_path / "True/model.safetensors")
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
