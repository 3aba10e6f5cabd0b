"""Low-rank adapters: what they train, where they would be ignored, and merging, saving and loading them."""

import json
import sys
from pathlib import Path

import peft
import pytest
import small_run
import torch
from test_trained_parts import DRIFT, SIZES, trained
from torch import Tensor, nn

from dma_lightning import DogeForCausalLM, LanguageModel, ModelConfig
from dma_lightning.cli.generate import generate
from dma_lightning.cli.huggingface import export_hf
from dma_lightning.cli.lora import export_lora, merge_lora
from dma_lightning.lora import Lora, add_adapters, as_peft_model, with_adapters_of
from dma_lightning.mixers import MIXERS

TOKENS = torch.randint(32, (2, 13), generator=torch.Generator().manual_seed(0))
LORA = ["--model.lora.rank=2", "--model.lora.alpha=6", "--trainer.max_steps=3", "--trainer.logger.name=lora"]
LAST, BASE = Path("runs/lora/version_0/checkpoints/last.ckpt"), Path(small_run.CHECKPOINTS) / "last.ckpt"


def drawn(model: nn.Module) -> nn.Module:
    """The model in float64 with random weights everywhere, since adapters have no effect at their initial values."""
    torch.manual_seed(1)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make(attention: str) -> DogeForCausalLM:
    """A small decoder, in the published form."""
    return DogeForCausalLM(ModelConfig(**SIZES | {"head_dim": 8, "attention": attention}))


@torch.no_grad()
def logits(model: DogeForCausalLM) -> tuple[Tensor, Tensor]:
    """Logits of all positions at once, and of the last ones by decoding steps."""
    cache = model.new_cache(len(TOKENS))
    model(TOKENS[:, :9], cache=cache)
    steps = [model(TOKENS[:, i : i + 1], cache=cache) for i in range(9, TOKENS.shape[1])]
    return model(TOKENS), torch.cat(steps, dim=1)


@pytest.mark.parametrize("attention", MIXERS)
def test_maps_whose_adapters_would_be_ignored_are_known(attention: str) -> None:
    """With an adapter of a single linear layer, the model computes what it does once that is merged, or does not."""
    names = {name.partition(".")[2] for name, x in make(attention).layers.named_modules() if isinstance(x, nn.Linear)}
    ignored = set()
    for name in names:
        model = make(attention)
        config = peft.LoraConfig(r=2, target_modules=[name])
        wrapped = drawn(peft.get_peft_model(model, config))
        before = logits(wrapped.base_model.model)
        after = logits(wrapped.merge_and_unload())
        if not all(torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in zip(before, after, strict=True)):
            ignored.add(name)
    assert ignored == {f"self_attn.{name}" for name in MIXERS[attention].read_weights}
    for name in ignored:
        with pytest.raises(ValueError, match=f"got '{name}', but the attention reads the weight of layers.0.{name} "):
            add_adapters(make(attention), Lora(targets=[name]), "all")
    model = make(attention)
    add_adapters(model, Lora(rank=2), "all")
    adapted = {name.split(".lora_")[0].partition(".")[2] for name in model.layers.state_dict() if "lora_" in name}
    assert adapted == names - ignored


def test_a_new_adapter_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = LanguageModel(**SIZES).eval()
    torch.manual_seed(0)
    adapted = LanguageModel(**SIZES, lora={"rank": 3, "targets": ["q_proj", "mlp.up_proj"]}).eval()
    assert torch.equal(plain(TOKENS), adapted(TOKENS))
    trained = {name for name, x in adapted.named_parameters() if x.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "up_proj" in name) for name in trained)
    assert adapted.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape == (3, 16)


@pytest.mark.parametrize("part", ["all", "selection", "attention"])
def test_only_adapters_and_the_named_part_are_trained(part: str, tmp_path: Path) -> None:
    options = {"lora": {"rank": 2, "dropout": 0.1}, "train_only": part, **DRIFT}
    before = trained(tmp_path / "none", 0, **options)
    after = trained(tmp_path, 4, **options)
    changed = {name for name in before if not before[name].equal(after[name])}
    adapters = {name for name in changed if "lora_" in name}
    assert {name for name in before if "lora_B" in name} <= adapters
    others = changed - adapters
    if part == "all":
        assert not others
    elif part == "selection":
        assert others
        assert all(".A" in name or "dt_proj" in name or "drifting" in name for name in others)
        assert any("q_proj" in name for name in adapters)
    else:
        assert any("q_proj.weight" in name for name in others)
        assert all("self_attn" in name for name in others)
        assert all("mlp" in name for name in adapters)


def test_going_on_in_a_run_is_exact(tmp_path: Path) -> None:
    """The checkpoint has the adapters, and the optimizer's moments of these alone."""
    options = {"lora": {"rank": 2, "alpha": 3.0}}
    whole = trained(tmp_path / "whole", 6, **options)
    trained(tmp_path / "parts", 4, **options)
    resumed = trained(tmp_path / "parts", 6, **options)
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())
    saved = torch.load(tmp_path / "parts/last.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) == sum("lora_" in name for name in whole)


def test_peft_saves_loads_and_merges(tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` reads what is saved, too; all compute the same."""
    model, lora = make("dma"), Lora(rank=2, alpha=3.0, targets=["v_proj", "down_proj"])
    plain = drawn(make("dma"))
    weights = {name: x.clone() for name, x in plain.state_dict().items()}
    model.double().load_state_dict(weights)
    add_adapters(model, lora, "all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.double().eval()
    wanted = logits(model)
    assert not torch.allclose(logits(plain)[0], wanted[0], atol=1e-3)
    as_peft_model(model, lora).save_pretrained(tmp_path)
    ours = with_adapters_of(plain, tmp_path).merge_and_unload(safe_merge=True).eval()
    assert ours.state_dict().keys() == weights.keys()
    other = make("dma").double().eval()
    other.load_state_dict(weights)
    theirs = peft.PeftModel.from_pretrained(other, str(tmp_path)).eval()
    for found in (logits(ours), logits(theirs.base_model.model)):
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


@pytest.fixture
def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, and a second one that trains adapters for its weights."""
    monkeypatch.chdir(tmp_path)
    small_run.make(tmp_path)
    small_run.fit(*small_run.DATA, *LORA, f"--model.init_from={BASE}", "--model.lr=0.1")


@pytest.mark.usefixtures("_run")
def test_commands_merge_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted = LanguageModel.load_from_checkpoint(LAST).eval()
    assert adapted.hparams.lora == {"rank": 2, "alpha": 6.0}
    base = LanguageModel.load_from_checkpoint(BASE).eval()
    merge_lora(LAST, Path("merged.ckpt"))
    export_lora(LAST, Path("adapters"))
    merge_lora(BASE, Path("again.ckpt"), Path("adapters"))
    for file in ("merged.ckpt", "again.ckpt"):
        merged = LanguageModel.load_from_checkpoint(file).eval()
        assert merged.state_dict().keys() == base.state_dict().keys()
        torch.testing.assert_close(merged(TOKENS), adapted(TOKENS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(TOKENS), adapted(TOKENS), atol=1e-3)
    for file in (LAST, Path("merged.ckpt")):
        generate(file, ["a"], max_new_tokens=2)
    export_hf(Path("merged.ckpt"), Path("exported"))
    small_run.fit(
        *small_run.DATA, "--trainer.max_steps=1", "--model.init_from=merged.ckpt", "--trainer.logger.name=more"
    )
    with pytest.raises(ValueError, match=r"target: expected a new file, got merged.ckpt, which exists"):
        merge_lora(LAST, Path("merged.ckpt"))
    with pytest.raises(ValueError, match=r"expected a checkpoint of a run with --model.lora, got .* without"):
        export_lora(BASE, Path("none"))
    with pytest.raises(ValueError, match="expected a checkpoint without adapters, since --adapter is given"):
        merge_lora(LAST, Path("both.ckpt"), Path("adapters"))
    with pytest.raises(ValueError, match=r"init_from .*: expected weights without adapters, .* merge-lora"):
        small_run.fit(*small_run.DATA, f"--model.init_from={LAST}")
    with pytest.raises(ValueError, match="expected a model without adapters, got one with adapters; merge them"):
        export_hf(LAST, Path("adapted"))
    small_run.fit(
        *small_run.DATA, *LORA[:-2], "--trainer.max_steps=4", "--trainer.logger.name=lora", "--ckpt_path=last"
    )
    assert "step=4.ckpt" in {file.name for file in LAST.parent.iterdir()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, r"adapter_config.json: expected plain LoRA of linear layers, got {'use_dora': True}"),
        ({"peft_type": "IA3"}, "expected plain LoRA of linear layers, got {'peft_type': 'IA3'}"),
        ({"megatron_config": {"a": 1}}, "expected plain LoRA of linear layers, got {'megatron_config'"),
        ({"new_field": 1}, "expected plain LoRA of linear layers, got {'new_field': 1}"),
        ({"r": 3}, r"expected adapters that fit the model, got others: expected rank 3, .* got \[2\]"),
        ({"r": "many"}, "adapter_config.json: Expected `int`"),
        ({"target_modules": "all-linear"}, "adapter_config.json: Expected `array`"),
        ({"target_modules": ["v_proj", "up_proj"]}, r"expected adapters of \['v_proj', 'up_proj'\], got others"),
        ({"target_modules": ["dt_proj"]}, "but the attention reads the weight of layers.0.self_attn.dt_proj directly"),
    ],
)
def test_strange_adapters_are_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    model, lora = make("dma"), Lora(rank=2, targets=["v_proj"])
    add_adapters(model, lora, "all")
    as_peft_model(model, lora).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        with_adapters_of(make("dma"), tmp_path)


def test_damaged_and_missing_adapters(tmp_path: Path) -> None:
    model, lora = make("dma"), Lora(rank=2, targets=["v_proj"])
    add_adapters(model, lora, "all")
    as_peft_model(model, lora).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="expected adapters that fit the model, got others"):
        with_adapters_of(make("dma"), tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: expected adapters that peft saved, got no such"):
        with_adapters_of(make("dma"), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"rank": 0}}, "lora: expected rank >= 1, alpha > 0 and a dropout of at least 0 and below 1, got 0"),
        ({"lora": {"r": 4}}, r"lora: expected options among \['rank', 'alpha', 'targets', 'dropout'\], got \['r'\]"),
        (
            {"lora": {"targets": ["qproj"]}},
            r"lora.targets: expected names of linear layers, .* got 'qproj'",
        ),
        ({"lora": {"targets": ["proj"]}}, r"lora.targets: expected names of linear layers, .* got 'proj'"),
        ({"lora": {"targets": ["lm_head"]}}, "lora.targets: expected names of linear layers, such as"),
        (
            {"lora": {"targets": ["q_proj", "dt_proj"]}},
            "got 'dt_proj', but the attention reads the weight of layers.0.self_attn.dt_proj directly",
        ),
        (
            {"lora": {"targets": ["v_proj"]}, "train_only": "attention"},
            "that train_only freezes, got 'v_proj', but train_only already trains layers.0.self_attn.v_proj",
        ),
        ({"lora": {}, "optimizer": "muon"}, "optimizer: expected adamw with lora, got 'muon'"),
    ],
)
def test_mistakes_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(**SIZES, **options)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"expected the library peft, got none; pip install 'dma-lightning\[lora\]'"):
        LanguageModel(**SIZES, lora={})
    LanguageModel(**SIZES)
