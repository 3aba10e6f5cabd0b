"""Two processes, sharded or not, equal one with twice the batch size. Their checkpoints are interchangeable."""

import contextlib
import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_runs
import pytest
import torch
from harmful import Harmful
from once import once, shared_folder
from together import ends_of, run_together
from torch.nn.parallel import DistributedDataParallel
from two_processes import TOGETHER, train

from dma_lightning import LanguageModel
from dma_lightning.callbacks import MixedWindows
from dma_lightning.checkpoints.io import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from dma_lightning.checkpoints.sharded import load_sharded
from dma_lightning.distributed import _watch

pytestmark = pytest.mark.usefixtures("runs_in_double")

HERE = Path(__file__).parent


class Outcome:
    """The files and exit statuses that two processes have left."""

    def __init__(self, above: Path) -> None:
        self.folder = once(above, "processes", _train_all)
        self.ends = ends_of(self.folder)
        self.log = (self.folder / "log0.txt").read_text()


def _train_all(folder: Path) -> None:
    for attention in ("dma", "mha"):
        for accumulate in (1, 2):
            train(folder / f"one-{attention}-{accumulate}", attention, accumulate)
    train(folder / "one-muon", accumulate=2, optimizer="muon")
    run_together(HERE / "two_processes.py", folder, 2, check=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All runs of two processes, and runs of one process to compare with."""
    return Outcome(shared_folder(tmp_path_factory))


def read(path: Path) -> dict:
    """The content of a checkpoint, with all tensors on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load(two: Outcome, run: str, step: int = 20) -> dict:
    """A checkpoint of a run, whether of two processes or of one."""
    path = two.folder / run / f"step={step}.ckpt"
    assert path.is_file(), two.log[-3000:]
    return read(path)


def assert_same(found: dict, expected: dict) -> None:
    """Compare names, weights and moments, which are all float64."""
    assert list(found["state_dict"]) == list(expected["state_dict"])
    for name, weight in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], weight, rtol=0, atol=1e-10)
    states, wanted = (checkpoint["optimizer_states"][0] for checkpoint in (found, expected))
    assert states["state"].keys() == wanted["state"].keys()
    for key, moments in wanted["state"].items():
        for name, moment in moments.items():
            torch.testing.assert_close(states["state"][key][name], moment, rtol=0, atol=1e-10)
    assert [group["params"] for group in states["param_groups"]] == [g["params"] for g in wanted["param_groups"]]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("run", ["ddp-dma", "ddp-mha", "fsdp-dma"])
def test_two_processes_are_one_of_twice_the_batch(run: str, accumulate: int, two: Outcome) -> None:
    for step in (10, 20):
        expected = load(two, f"one-{run.split('-')[1]}-{accumulate}", step)
        assert_same(load(two, f"{run}-{accumulate}", step), expected)
    assert expected["state_dict"]["model.embed_tokens.weight"].dtype == torch.float64


@pytest.mark.parametrize("run", ["ddp-muon", "fsdp-muon"])
def test_two_processes_with_muon_are_one(run: str, two: Outcome) -> None:
    assert_same(load(two, run), load(two, "one-muon"))


@pytest.mark.parametrize("run", ["one-dma-1", "fsdp-sharded"])
def test_two_processes_refuse_moments_of_another_optimizer(run: str, two: Outcome) -> None:
    for rank in range(2):
        error = json.loads((two.folder / f"{run}-refused-{rank}.json").read_text())
        assert re.search(r"step=10\.ckpt: expected a state of optimizer 'muon', .* got one of 'adamw'", error)


@pytest.mark.parametrize("run", ["ddp-compiled", "fsdp-compiled"])
def test_compiled_and_recomputed_layers_are_the_same(run: str, two: Outcome) -> None:
    assert_same(load(two, run), load(two, "one-dma-1"))


@pytest.mark.skipif(TOGETHER != "gpu", reason="needs two GPUs")
def test_cuda_graphs_of_two_processes(two: Outcome) -> None:
    assert_same(load(two, "ddp-graphs"), load(two, "one-dma-1"))


@pytest.mark.parametrize("run", ["ddp-resumed", "fsdp-resumed"])
def test_two_go_on_from_one(run: str, two: Outcome) -> None:
    resumed, one = load(two, run), load(two, "one-dma-1")
    assert_same(resumed, one)
    groups, own = (x["optimizer_states"][0]["param_groups"] for x in (resumed, one))
    assert [group["fused"] for group in groups] == [group["fused"] for group in own]


def test_processes_that_find_different_checkpoints_do_not_train(two: Outcome) -> None:
    for rank in range(2):
        error = json.loads((two.folder / f"checkpoint-{rank}.json").read_text())
        assert re.search(
            r"expected the same checkpoint in all processes, got rank 0 .*/0\.ckpt; rank 1 .*/1\.ckpt", error
        )


@pytest.mark.parametrize("run", ["guarded-ddp", "guarded-fsdp"])
def test_a_gradient_that_is_not_finite_is_left_out_in_both(run: str, two: Outcome) -> None:
    saved = load(two, run)
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    (steps,) = {int(state["step"]) for state in saved["optimizer_states"][0]["state"].values()}
    assert steps == 19


def test_both_keep_all_keys_in_the_same_steps(two: Outcome, tmp_path: Path) -> None:
    train(tmp_path, accumulate=2, callbacks=(MixedWindows(share=0.5),))
    assert_same(load(two, "mixed"), read(tmp_path / "step=20.ckpt"))
    with pytest.raises(AssertionError):
        assert_same(load(two, "mixed"), load(two, "one-dma-2"))


def test_dropout_goes_on_in_each(two: Outcome) -> None:
    assert_same(load(two, "dropout-resumed"), load(two, "dropout"))
    with pytest.raises(AssertionError):
        assert_same(load(two, "dropout"), load(two, "ddp-dma-1"))
    first, second = (states["torch"] for states in load(two, "dropout", 10)["rng_states"])
    assert not torch.equal(first, second)


def test_sharded_checkpoints(two: Outcome, tmp_path: Path) -> None:
    assert_same(load(two, "fsdp-from-sharded"), load(two, "one-dma-1"))
    shutil.copytree(two.folder / "fsdp-sharded", tmp_path / "saved", symlinks=True)
    assert newest_checkpoint([tmp_path]) == tmp_path / "saved/step=20.ckpt"
    shard = next((tmp_path / "saved/step=20.ckpt").glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"last skips .*step=20\.ckpt: expected a whole .*distcp: expected at least"):
        assert newest_checkpoint([tmp_path]) == tmp_path / "saved/step=13.ckpt"
    (tmp_path / "saved/step=13.ckpt/meta.pt").unlink()
    with pytest.warns(UserWarning, match=r"last skips .*step=13\.ckpt"):
        assert newest_checkpoint([tmp_path]) == tmp_path / "saved/step=10.ckpt"
    with pytest.raises(ValueError, match=r"expected a checkpoint of one file, got .*step=10\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "saved/step=10.ckpt")


def test_a_killed_write_of_a_sharded_checkpoint_leaves_the_one_before(two: Outcome) -> None:
    """There is one at step 13, after the validation; that of step 20 never came to its name."""
    assert (two.folder / "fsdp-torn/last.ckpt.tmp").is_dir()
    path = newest_checkpoint([two.folder / "fsdp-torn"])
    assert (path.name, read_checkpoint(path)["global_step"]) == ("last.ckpt", 13)


@pytest.mark.parametrize("where", [".metadata", "value"])
def test_sharded_checkpoints_run_no_code(
    where: str, two: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved"
    shutil.copytree(two.folder / "fsdp-sharded/step=10.ckpt", path)
    monkeypatch.chdir(tmp_path)
    module = train(tmp_path / "one")
    optimizer = module.optimizers(use_pl_optimizer=False)
    load_sharded(path, module, [optimizer])
    expected = load(two, "one-dma-1", 10)
    torch.testing.assert_close(module.state_dict(), expected["state_dict"], rtol=0, atol=1e-10)
    moments = (state["state"][0]["exp_avg"] for state in (optimizer.state_dict(), expected["optimizer_states"][0]))
    torch.testing.assert_close(*moments, rtol=0, atol=1e-10)

    index = pickle.loads((path / ".metadata").read_bytes())
    if where == ".metadata":
        index.storage_meta = Harmful()
    else:
        entry = next(x for key, x in index.storage_data.items() if key.fqn.endswith("weight_decay"))
        harm = io.BytesIO()
        torch.save(Harmful(), harm)
        entry.length, entry.offset = len(harm.getvalue()), (path / entry.relative_path).stat().st_size
        with (path / entry.relative_path).open("ab") as file:
            file.write(harm.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(index))
    for read in (lambda: load_sharded(path, module, [optimizer]), lambda: read_checkpoint(path)):
        with pytest.raises(ValueError, match=r"expected the index of a sharded|expected a plain value"):
            read()
    assert not Path("harm").exists()


@pytest.mark.parametrize("run", ["ddp-dma-1", "fsdp-dma-1"])
def test_one_goes_on_from_two(run: str, two: Outcome, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"has 2 processes and this run has 1: random numbers \(for dropout\) continue"
    ):
        train(tmp_path, ckpt_path=two.folder / run / "step=10.ckpt")
    assert_same(read(tmp_path / "step=20.ckpt"), load(two, "one-dma-1"))


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_both_after_the_next_logging_step(number: str, status: int, two: Outcome) -> None:
    for rank in range(2):
        assert json.loads((two.folder / f"{number}-{rank}.json").read_text()) == status
    (checkpoint,) = (file for file in (two.folder / number).glob("[!.]*") if not file.is_symlink())
    assert checkpoint.name == "step=6.ckpt"
    assert len(read(checkpoint)["rng_states"]) == 2


@pytest.mark.skipif(TOGETHER != "cpu", reason="with NCCL, what has started the processes ends them")
def test_a_killed_process_ends_the_other(two: Outcome) -> None:
    other, killed = two.ends
    assert killed.status == -9
    assert other.status not in (0, -9)
    assert 0 < other.seconds < 60
    assert "rank 0: ended at step 6 by RuntimeError. If a connection was lost, another process ended first" in two.log
    assert not list((two.folder / "killed").glob("[!.]*"))


def start(subcommand: str, options: list[str], folder: Path) -> subprocess.Popen[str]:
    """Run a subcommand with the small model of the kill script. It starts a second process."""
    options = [*kill_runs.OPTIONS, f"--trainer.accelerator={TOGETHER}", "--trainer.strategy=ddp", *options]
    command = [sys.executable, "-W", "ignore", "-m", "dma_lightning", subcommand, *options, "--trainer.devices=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def test_predict_ends_when_both_have_written(tmp_path: Path) -> None:
    options = [
        "--trainer.callbacks+=two_processes.Late",
        "--trainer.callbacks+=dma_lightning.callbacks.ContinuationWriter",
    ]
    process = start("predict", [*options, "--data.test_examples=16", "--trainer.logger=false"], tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    lines = [len(file.read_text().splitlines()) for file in tmp_path.glob("continuations-rank*.jsonl")]
    assert lines == [8, 8]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_ends_all_that_fit_has_started(killed: int, tmp_path: Path) -> None:
    options = ["--trainer.callbacks+=two_processes.Announce", "--trainer.max_steps=1000000"]
    process = start("fit", options, tmp_path)
    try:
        numbers = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
        deadline = time.monotonic() + 120
        while not all(number.exists() for number in numbers) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(int(numbers[killed].read_text()), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)  # until both have closed it
    finally:
        with contextlib.suppress(ProcessLookupError):  # as it should be
            os.killpg(process.pid, signal.SIGKILL)
    launcher_says = ("rank 1: the first process has ended", "terminated with code -9")[killed]
    assert re.search(f"{launcher_says}|rank {1 - killed}: ended at step", output)  # gloo may be first
    assert process.returncode != 0


def test_compiled_layers_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: Outcome) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        train(tmp_path, compile_layers=True, activation_checkpointing=True)
    assert_same(read(tmp_path / "step=20.ckpt"), load(two, "one-dma-1"))


def test_ddp_leaves_compiled_layers_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **_: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):
            module = LanguageModel(compile_layers=True, hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
            module.configure_model()
            DistributedDataParallel(module.model)(torch.zeros(1, 16, dtype=torch.long)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 1  # that of both layers, of more than the 1 MB at which DDP's first bucket would end


def test_a_started_process_ends_with_the_first(capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    first = os.fork()
    if not first:  # the first process starts another and is no more
        process = os.getpid()
        if not os.fork():
            _watch(process, rank=1, seconds=0.01)
        os._exit(0)
    os.waitpid(first, 0)
    os.close(writing)  # the other has it open until it ends
    assert os.read(reading, 1) == b""
    assert "rank 1: the first process has ended, so this one ends too" in capfd.readouterr().err
