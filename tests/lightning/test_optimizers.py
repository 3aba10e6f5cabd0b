"""Muon and AdamW as one optimizer, in a run and on its own."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import torch
from once import once, shared_folder
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from dma_lightning import LanguageModel
from dma_lightning.optimizers import MuonAdamW, weights_with_one_moment

DRIFT = {"drift": "gate", "score_form": "linear", "content": "input", "retention_weight": 0.1, "keep_last": 2}
LARGE = ("q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj", "kv_b_proj", "mlp", r"compress_.\.\w+\.\d")


def configured(**options: object) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """A small model and its optimizer."""
    module = LanguageModel(vocab_size=32, **small_run.SIZES | options)
    module._trainer = SimpleNamespace(max_steps=10, precision="32-true")
    return module, module.configure_optimizers()["optimizer"]


@pytest.mark.parametrize(
    "options",
    [{}, DRIFT, {"attention": "mha", "drift": "gate"}, {"attention": "mla"}, {"attention": "nsa"}],
    ids=["dma", "drift", "mha", "mla", "nsa"],
)
def test_each_parameter_is_in_one_part(options: dict[str, object]) -> None:
    module, optimizer = configured(optimizer="muon", **options)
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert isinstance(optimizer, MuonAdamW)
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    large = re.compile(rf"layers\.\d+\..*({'|'.join(LARGE)}).*weight$")
    assert set(groups[0]) == {name for name in names.values() if large.search(name)}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]
    (_, plain) = configured(**options)
    assert type(plain) is AdamW
    assert [len(group["params"]) for group in plain.param_groups] == [len(groups[0] + groups[1]), len(groups[2])]
    one_moment = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
    assert weights_with_one_moment("muon", module.model) == one_moment > 0
    assert weights_with_one_moment("adamw", module.model) == 0


def parameters() -> list[nn.Parameter]:
    """A matrix for Muon, a matrix and a vector for AdamW."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((3, 7), (5, 3), (3,))]


def made(given: list[nn.Parameter]) -> MuonAdamW:
    """An optimizer of `parameters`."""
    matrix, table, vector = given
    return MuonAdamW([matrix], [{"params": [table]}, {"params": [vector], "weight_decay": 0.0}], lr=0.1)


def step(given: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Take a step on a loss, through a closure."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((parameter - 1).pow(4).sum() for parameter in given)
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def test_steps_are_those_of_both_optimizers_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    matrix, table, vector = theirs
    groups = [{"params": [table]}, {"params": [vector], "weight_decay": 0.0}]
    apart = [Muon([matrix], lr=0.1, adjust_lr_fn="match_rms_adamw"), AdamW(groups, lr=0.1)]
    optimizer = made(ours)
    for _ in range(3):
        step(ours, optimizer)
        for parameter in theirs:
            parameter.grad = None
        sum((parameter - 1).pow(4).sum() for parameter in theirs).backward()
        for other in apart:
            other.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("renewed", ["no", "loaded", "copied"])
def test_a_schedule_reaches_both_parts(renewed: str) -> None:
    given = parameters()
    optimizer = made(given)
    step(given, optimizer)
    if renewed == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif renewed == "copied":
        given, optimizer = copy.deepcopy((given, optimizer))
    LambdaLR(optimizer, lambda _: 0.0)
    before = [parameter.clone() for parameter in given]
    step(given, optimizer)
    assert all(torch.equal(x, y) for x, y in zip(before, given, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    step(given, optimizer)
    assert not any(torch.equal(x, y) for x, y in zip(before, given, strict=True))
    assert {len(optimizer.state[parameter]) for parameter in given} == {1, 3}


def test_groups_that_come_later() -> None:
    given, late = parameters(), nn.Parameter(torch.zeros(2, 3))
    optimizer = made(given)
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    step([*given, late], optimizer)
    torch.testing.assert_close(late, torch.full_like(late, 0.5))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [late]})


@pytest.mark.parametrize(("own", "other"), [("muon", "adamw"), ("adamw", "muon")])
def test_a_state_of_the_other_is_refused(own: str, other: str) -> None:
    (_, optimizer), (_, another) = configured(optimizer=own), configured(optimizer=other)
    with pytest.raises(ValueError, match=rf"expected a state of optimizer '{own}', .* got one of '{other}'; set model"):
        optimizer.load_state_dict(another.state_dict())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_state_does_not_say_how_to_compute(name: str) -> None:
    _, optimizer = configured(optimizer=name)
    state = optimizer.state_dict()
    options = [dict(group) for group in state["param_groups"]]
    for group in state["param_groups"]:
        group.update(fused=True, eps=1.0, ns_steps=10**9 if "ns_steps" in group else 0, lr=0.5)
        if name == "adamw":
            del group["ns_steps"]
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"] == [group | {"lr": 0.5} for group in options]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer: expected one of \['adamw', 'muon'\], got 'sgd'"):
        LanguageModel(vocab_size=32, optimizer="sgd")


MODEL = [f"--model.{name}={value}" for name, value in DRIFT.items()]
TRAINER = [
    "--model.optimizer=muon", "--model.schedule=cosine", "--trainer.accumulate_grad_batches=2",
    "--trainer.gradient_clip_val=0.5", "--trainer.precision=bf16-mixed", "--checkpoint.save_top_k=-1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a command-line run with Muon, with checkpoints of all three steps."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", ["dma-lightning"])
            small_run.make(folder, *MODEL, *TRAINER)

    return once(shared_folder(tmp_path_factory), "muon", make)


def saved(run: Path, step: int) -> dict:
    """A checkpoint of the run."""
    return torch.load(run / small_run.CHECKPOINTS / f"step={step}.ckpt", weights_only=True)


def test_a_run_trains_all_by_one_schedule(run: Path) -> None:
    first, last = saved(run, 1), saved(run, 3)
    (state,) = last["optimizer_states"]
    assert len({group["lr"] for group in state["param_groups"]}) == 1
    assert len(state["param_groups"]) == 3
    assert state["param_groups"][0]["lr"] < first["optimizer_states"][0]["param_groups"][0]["lr"]
    same = {name for name, weight in first["state_dict"].items() if torch.equal(weight, last["state_dict"][name])}
    assert same == {"model.layers.0.self_attn.A"}  # which has no effect if all heads have a drift
    assert last["hyper_parameters"]["optimizer"] == "muon"


def test_a_run_goes_on_exactly(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    monkeypatch.setattr("sys.argv", ["dma-lightning"])
    checkpoint = f"--ckpt_path={run / small_run.CHECKPOINTS / 'step=1.ckpt'}"
    options = [checkpoint, "--data.path=text.txt", f"--trainer.logger.save_dir={tmp_path}", *TRAINER[2:]]
    done = small_run.fit("--trainer.max_steps=3", *options)
    assert done.trainer.global_step == 3
    expected = saved(run, 3)
    weights = done.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected["state_dict"].items())
    states = done.trainer.optimizers[0].state_dict()["state"]
    for key, moments in expected["optimizer_states"][0]["state"].items():
        assert all(torch.equal(states[key][name], moment) for name, moment in moments.items())

    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=r"step=1\.ckpt: expected a state of optimizer 'adamw', .* got one of 'muon'"):
        small_run.fit(checkpoint, "--data.path=text.txt", "--model.optimizer=adamw", "--trainer.max_steps=3")
    assert sorted(run.rglob("*")) == before
    small_run.validate(run / small_run.CHECKPOINTS / "step=1.ckpt", "--model.optimizer=adamw", "--data.path=text.txt")
