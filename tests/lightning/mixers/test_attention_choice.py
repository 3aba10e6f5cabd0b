"""Every attention can be chosen by one word in a config, has the parameters of its specification, and trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dma_lightning import MIXERS, DogeForCausalLM, LanguageModel
from dma_lightning.cli import build_cli, main
from dma_lightning.cli.sizes import read_config

ROOT = Path(__file__).parents[3]
SHAPES = sorted(path.stem for path in (ROOT / "configs/model").glob("*.yaml"))
CHOSEN = {
    "drift": "gate",
    "score_form": "linear",
    "content": "input",
    "content_in_bias": False,
    "retention_weight": 0.1,
    "retention_target": "output",
}
TASKS = {"tiny": ("tiny", "pydoc"), "mqar": ("mqar", "mqar")}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_specification(shape: str) -> None:
    """Counted by hand: projections, norms, and what each attention has besides."""
    config = replace(read_config(ROOT / f"configs/model/{shape}.yaml"), num_hidden_layers=2)  # of which all are alike
    d, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    dim = config.head_dim or d // heads
    grouped = 2 * d * heads * dim + 2 * d * kv_heads * dim + 2 * dim
    rank, rope, nope, value = (
        config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim,
    )  # fmt: skip
    block, hidden = config.nsa_compress_block, config.nsa_compress_hidden
    gates = kv_heads * (d + 1) if config.drift == "gate" else 0
    content = kv_heads * d if config.content == "input" else 0
    expected = {
        "mha": grouped + gates,
        "swa": grouped + gates,
        "dma": grouped + kv_heads * dim * kv_heads + kv_heads + gates + content,
        "mla": d * heads * (nope + rope) + d * (rank + rope) + rank + rank * heads * (nope + value) + heads * value * d,
        "nsa": grouped + 4 * d * kv_heads * dim + 2 * dim
        + 2 * (block * dim * hidden + hidden * dim) + 2 * block * dim + 3 * d * heads,
    }  # fmt: skip
    with torch.device("meta"):
        models = {name: DogeForCausalLM(replace(config, attention=name)) for name in MIXERS}
    for name, model in models.items():
        assert {sum(p.numel() for p in layer.self_attn.parameters()) for layer in model.layers} == {expected[name]}
    published = {"80m": (1.77, 1.598), "200m": (3.15, 2.818), "680m": (7.08, None), "1.7b": (12.58, None)}
    mha, mla = published.get(shape.removesuffix("-published"), (None, None))  # in millions, without norms
    if mha and not gates:
        assert (expected["mha"] - 2 * dim) / 1e6 == pytest.approx(mha, abs=0.006)
    if mla:
        assert expected["mla"] / 1e6 == pytest.approx(mla, abs=0.0006)


@pytest.mark.parametrize("shape", [x for x in SHAPES if x.endswith("-published")])
def test_published_shapes_differ_in_dynamic_masks_alone(shape: str) -> None:
    """As many keys per query, and one form of dynamic masks in all shapes."""
    chosen, published = (
        yaml.safe_load((ROOT / f"configs/model/{x}.yaml").read_text())["model"]
        for x in (shape.removesuffix("-published"), shape)
    )
    assert published.pop("keep_window_size") == chosen.pop("keep_window_size") + chosen.pop("keep_last")
    assert {x: chosen[x] for x in chosen.keys() - published.keys()} == CHOSEN
    assert published.items() <= chosen.items()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("attention", MIXERS)
def test_trains(attention: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps through the command line: finite gradients in all parameters, and the checkpoint makes text."""
    model, data = (
        ROOT / f"configs/{kind}/{name}.yaml" for kind, name in zip(("model", "data"), TASKS[task], strict=True)
    )
    monkeypatch.chdir(tmp_path)
    missing: set[str] = set()

    def look(self: LanguageModel, *_: object) -> None:
        for name, parameter in self.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all():
                missing.add(name)

    monkeypatch.setattr(LanguageModel, "on_before_optimizer_step", look)
    build_cli(
        [
            "fit", "-c", str(model), "-c", str(data), "--model.attention", attention, "--model.num_hidden_layers", "1",
            "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1",
            "--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--trainer.default_root_dir", ".",
            "--data.batch_size", "2",
        ]
    )  # fmt: skip
    assert not missing
    (checkpoint,) = tmp_path.rglob("step=*.ckpt")
    if task == "tiny":
        monkeypatch.setattr(
            "sys.argv", ["", "generate", f"--ckpt_path={checkpoint}", "--prompt=a", "--max_new_tokens=3"]
        )
        main()
    loaded = LanguageModel.load_from_checkpoint(checkpoint, map_location="cpu")
    assert type(loaded.model.layers[0].self_attn) is MIXERS[attention]


def test_a_mistyped_attention_lists_the_known(capfd: pytest.CaptureFixture) -> None:
    files = ("configs/model/80m.yaml", "configs/data/pydoc.yaml")
    with pytest.raises((SystemExit, ValueError)) as error:
        build_cli(["fit", *(part for file in files for part in ("-c", str(ROOT / file))), "--model.attention", "nsaa"])
    text = str(error.value) + capfd.readouterr().err
    assert "attention: expected one of ['dma', 'mha', 'swa', 'mla', 'nsa'], got 'nsaa'" in text


def test_sizes_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    typo = tmp_path / "typo.yaml"
    typo.write_text("model:\n  keep_windw_size: 3\n")
    shape = str(ROOT / "configs/model/80m-published.yaml")
    monkeypatch.setattr("sys.argv", ["", "sizes", shape, "--sequence_length", "1024"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(MIXERS)
    # 2 * 84.98M, and 4 * 768 channels * 512.5 keys in 12 layers; 2 * 3 * 128 numbers in each of these
    assert lines[3] == "| mha | 84.98M | 21.24M | 9,216 | 0.189G |"
    monkeypatch.setattr("sys.argv", ["", "sizes", "mqar"])  # of three configs of that name, the one of a model
    main()
    assert capsys.readouterr().out.startswith("| `mqar`, 4,096 tokens |")
    for arguments, message in (
        ([str(ROOT / "configs/trainer/cpu.yaml")], "expected a YAML file with model:"),
        ([str(tmp_path / "missing.yaml")], "path: expected a file or the name of a shipped config, got"),
        ([str(typo)], "does not accept option 'keep_windw_size'"),
        ([str(ROOT / "configs/model/80m.yaml"), "--sequence_length", "0"], "sequence_length: expected at least 1"),
    ):
        monkeypatch.setattr("sys.argv", ["", "sizes", *arguments])
        with pytest.raises(SystemExit, match=message):
            main()
