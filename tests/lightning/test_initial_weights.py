"""A run that begins from given weights has the logits of their model, and takes nothing else from it."""

import json
import shutil
from pathlib import Path

import pytest
import small_run
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, DogeConfig, LlamaConfig, Qwen2Config, Qwen3Config

from dma_lightning import ByteTokenizer, FileTokenizer, LanguageModel
from dma_lightning.checkpoints.arguments import model_arguments
from dma_lightning.initial_weights import InitialWeights

LENGTH = 48
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
NEW = {f"layers.*.{name} (2)" for name in ("input_residual", "post_attention_residual", "self_attn.A")}
DT_PROJ = {"layers.*.self_attn.dt_proj.weight (2)"}
OF_BIAS = {"layers.*.self_attn.dt_proj.bias (2)"}
DRIFT = {f"layers.*.self_attn.drift{name} (2)" for name in (".rate", ".weight")}
CASES = {
    "llama": (LlamaConfig(**SIZES), {}, NEW | DT_PROJ),
    "llama, biases, tied": (
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **LINEAR),
        {}, NEW | DT_PROJ | OF_BIAS,
    ),
    "llama, sliding": (LlamaConfig(**SIZES), {"attention": "swa", "sliding_window": 60, "drift": "gate"},
                       NEW - {"layers.*.self_attn.A (2)"} | DRIFT),
    "qwen2": (Qwen2Config(**SIZES), {}, NEW | DT_PROJ | OF_BIAS | {"layers.*.self_attn.o_proj.bias (2)"}),
    "qwen3": (Qwen3Config(**SIZES, head_dim=24), {}, NEW | DT_PROJ),
    "qwen3, drift": (
        Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True, attention_bias=True),
        {"drift": "constant", "score_form": "linear"},
        NEW | DT_PROJ | OF_BIAS | {"layers.*.self_attn.drifting.drift.rate (2)"},
    ),
    "doge": (DogeConfig(**SIZES, keep_window_size=LENGTH), {}, set()),
}  # fmt: skip


def make_theirs(config: object) -> nn.Module:
    """A model of Transformers in which all biases and norms have an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            mean = 0.3 if name.endswith(".A") else 0.0 if name.endswith("bias") else 1.0
            nn.init.normal_(parameter, mean=mean, std=0.2)
        else:
            nn.init.normal_(parameter, std=0.1)
    return model


def begun(folder: Path, **changed: object) -> tuple[LanguageModel, str]:
    """A model with the weights of a folder, and the message about tensors that are new."""
    initial = InitialWeights.open(folder, LanguageModel)
    arguments = {"vocab_size": 7, "max_position_embeddings": 64} | initial.arguments | changed
    module = LanguageModel(**arguments).eval()
    _, *lines = initial.lines(initial.fill(module.model))
    assert not any("left out" in line for line in lines)
    return module, "".join(lines).rpartition(": ")[2]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_of_transformers(case: str, tmp_path: Path) -> None:
    config, changed, new = CASES[case]
    theirs = make_theirs(config)
    theirs.save_pretrained(tmp_path)
    module, told = begun(tmp_path, **changed)
    assert set(told.split(", ")) - {""} == new
    tokens = torch.randperm(61)[None, :LENGTH]  # no token twice: no ties, which a Doge of theirs breaks at random
    with torch.no_grad():
        ours, expected = module(tokens), theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["safetensors in parts", "pickle", "pickles in parts"])
def test_weights_come_out_of_files_of_every_form(form: str, tmp_path: Path) -> None:
    theirs = make_theirs(CASES["qwen2"][0])
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if form == "safetensors in parts" else "1GB")
    state = theirs.state_dict()
    if form == "pickle":  # of an old torch
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "pickles in parts":
        files = {name: f"part-{number % 2}.bin" for number, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: x for name, x in state.items() if files[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    if form != "safetensors in parts":
        (tmp_path / "model.safetensors").unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) != 1
    mine = begun(tmp_path)[0].model.state_dict()
    for name, x in state.items():
        assert torch.equal(mine[name.removeprefix("model.")], x), name


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (CASES["llama"][0], {"rope_parameters": {"rope_type": "llama3"}}, "rope_type: expected .*, got 'llama3'"),
        (CASES["llama"][0], {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: .*, got 'dynamic'"),
        (CASES["llama"][0], {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1\.0, got 0\.5"),
        (CASES["llama"][0], {"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        (CASES["llama"][0], {"sliding_window": 8}, "sliding_window: expected None, got 8"),
        (CASES["qwen2"][0], {"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
        (CASES["qwen3"][0], {"layer_types": ["sliding_attention"]}, "layer_types: .*got .'sliding_attention'"),
        (CASES["qwen3"][0], {"model_type": "qwen3_moe", "num_experts": 8}, "'qwen3_moe' with 8 experts, which are not"),
        (CASES["qwen3"][0], {"attention_bias": True}, "weights do not match config.json: .*bias expected"),
    ],
    ids=range(9),
)
def test_what_we_do_not_have_is_refused_by_its_name(
    config: object, changed: dict, message: str, tmp_path: Path
) -> None:
    make_theirs(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        InitialWeights.open(tmp_path, LanguageModel)


def test_tokens_are_compared_with_those_of_the_weights(tmp_path: Path) -> None:
    make_theirs(CASES["llama"][0]).save_pretrained(tmp_path)
    for name, tokens in (("tokenizer", "abc"), ("same", "abc"), ("other", "bac")):
        vocabulary = {token: number for number, token in enumerate(tokens)}
        Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / f"{name}.json"))
    initial = InitialWeights.open(tmp_path, LanguageModel)
    assert initial.knows_tokens_of(FileTokenizer(tmp_path / "same.json"))
    assert not initial.knows_tokens_of(FileTokenizer(tmp_path / "other.json"))
    assert not initial.knows_tokens_of(ByteTokenizer())
    with pytest.raises(ValueError, match=r"vocab_size: expected 61, as the weights in .*, got 62; use the tokenizer"):
        initial.check({"vocab_size": 62})


def test_no_checkpoint_names_weights_to_begin_from() -> None:
    saved = {"hyper_parameters": {"init_from": "elsewhere", "lr": 0.1}}
    assert model_arguments(saved, Path("a.ckpt"), LanguageModel) == {"lr": 0.1}
    assert "init_from" not in LanguageModel(init_from="elsewhere").hparams


@pytest.fixture
def source(_small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small run's checkpoint, in a new working folder with the run's text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dma-lightning"])
    shutil.copy(_small_run / "text.txt", tmp_path)
    return Path(shutil.copy(_small_run / small_run.CHECKPOINTS / "last.ckpt", tmp_path / "source.ckpt"))


def test_a_run_begins_from_weights_once(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With longer sequences, another window, another base and a drift; then it goes on without them."""
    before = torch.load(source, weights_only=True)["state_dict"]
    command = [
        f"--model.init_from={source}", *small_run.DATA, "--data.sequence_length=24", "--model.rope_theta=5e4",
        "--model.keep_window_size=12", "--model.keep_last=3", "--model.drift=gate", "--model.score_form=linear",
        "--model.lr=1e-9", "--ckpt_path=last",
    ]  # fmt: skip

    with pytest.raises(
        ValueError, match=r"num_hidden_layers: expected 1, as the weights in .*source\.ckpt have, got 2"
    ):
        small_run.fit(*command, "--model.num_hidden_layers=2", "--trainer.max_steps=1")
    cli = small_run.fit(*command, "--trainer.max_steps=1")
    told = capsys.readouterr().out
    assert f"init_from {source}: {len(before)} tensors; " in told
    assert "missing there, so initialized as in a new model: layers.0.self_attn.drifting.drift.rate, layers.0." in told
    config = cli.model.model.config
    assert (config.hidden_size, config.keep_window_size, config.rope_theta) == (16, 12, 5e4)
    assert (config.max_position_embeddings, cli.trainer.global_step) == (24, 1)
    for name, x in before.items():
        torch.testing.assert_close(cli.model.state_dict()[name], x, rtol=0, atol=1e-7)

    with pytest.raises(ValueError, match=r"starts from runs/.* to have its own folder, got the folder of these weig"):
        small_run.fit(f"--model.init_from={small_run.CHECKPOINTS}/last.ckpt", *command[1:])

    source.unlink()
    cli.model.setup("validate")  # does not take them again
    cli = small_run.fit(*command, "--trainer.max_steps=2")
    assert cli.trainer.global_step == 2
    assert "init_from" not in capsys.readouterr().out
