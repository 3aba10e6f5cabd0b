"""Runs of several processes that divide sequences equal the run of one process. Checkpoints are interchangeable."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from fit_parts import PROCESSES
from fit_runs import DRIFT, RETENTION, train
from once import once, shared_folder
from test_processes import assert_same, read
from together import run_together

from dma_kernels.context import ContextGroup
from dma_lightning import LanguageModel
from dma_lightning.data.parts import part_of_batch
from dma_lightning.monitoring.recording import check_whole_sequences
from dma_lightning.strategies import FullyShardedStrategy

pytestmark = pytest.mark.usefixtures("runs_in_double")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process and four have left their checkpoints."""
    return once(shared_folder(tmp_path_factory), "fit-parts", _fit_all)


def _fit_all(folder: Path) -> None:
    (folder / "text.txt").write_text("".join(topics.values())[:20000])
    train(folder / "one", length=14, **DRIFT)
    train(folder / "one-pairs", accumulate=2, **DRIFT)
    train(folder / "one-retention", accumulate=2, **RETENTION)
    train(folder / "one-swa", length=14, attention="swa", sliding_window=5)
    run_together(HERE / "fit_parts.py", folder, PROCESSES)


def figures(folder: Path) -> dict[str, float]:
    """The last figures that a run has logged."""
    return json.loads((folder / "figures.json").read_text())


def compare(folder: Path, run: str, one: str, steps: tuple[int, ...] = (4, 8)) -> None:
    """Compare checkpoints and figures of a run with those of one process."""
    for step in steps:
        assert_same(read(folder / run / f"step={step}.ckpt"), read(folder / one / f"step={step}.ckpt"))
    found, wanted = (figures(folder / name) for name in (run, one))
    assert ("context/mib_per_step" in found) == (run != "again")
    found.pop("context/mib_per_step", None)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert {"val/loss", "val/bits_per_byte", "val/accuracy", "train/loss"} <= wanted.keys()


@pytest.mark.parametrize("run", ["pairs", "retention", "swa"])
def test_parts_train_as_the_whole(run: str, folder: Path) -> None:
    """Two groups of two; a loss of the layers; a length that four do not divide."""
    compare(folder, run, f"one-{run}")


def test_what_is_sent_is_counted(folder: Path) -> None:
    """A window of 5 in 4 parts of 4 positions: each process sends 4 keys of 4 sequences."""
    keys, float64 = 4 * 4, 8
    rows = keys * (8 + 8 + 1) * float64  # key, value and bias
    layer = 2 * (rows + keys * (4 + 4)) + rows + keys * 4  # forward, recomputed: rank and document, too; backward
    batch = 16 + 4 * 4 * 8  # number of labels; borders of documents
    assert figures(folder / "swa")["context/mib_per_step"] * 2**20 == 2 * 3 * (2 * layer + batch)


def test_four_go_on_from_one(folder: Path) -> None:
    compare(folder, "resumed", "one", (8,))


def test_one_goes_on_from_two_groups(folder: Path) -> None:
    train(folder / "again", accumulate=2, ckpt_path=folder / "pairs/step=4.ckpt", **DRIFT)
    compare(folder, "again", "one-pairs", (8,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with NCCL, what has started the processes ends them")
def test_a_killed_process_ends_the_other_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    """Bit for bit, with dropout and a loss in chunks; `kill_runs.py` does it on the command line, too."""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "kill_part.py"), str(tmp_path)]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=150)
    log = (tmp_path / "killed/log.txt").read_text()
    assert done.returncode == 0, done.stderr[-2000:] + log[-2000:]
    codes, seconds, checkpoint = json.loads((tmp_path / "result.json").read_text())
    assert (codes, checkpoint) == ([-signal.SIGKILL, 1], "step=6.ckpt")
    assert seconds < 60
    assert "rank 1: ended at step 7 by RuntimeError. If a connection was lost, another process ended first" in log
    for rank in range(2):
        whole, killed = (losses(tmp_path / run / f"losses{rank}.jsonl") for run in ("whole", "killed"))
        assert [batch for batch, _ in whole] == list(range(1, 17))
        # Killed in batch 15, for which the other may have had no loss yet; gone on after step 6, of two batches each.
        assert killed in [whole[:batch] + whole[12:] for batch in (14, 15)]
    weights, wanted = (read(tmp_path / run / "step=8.ckpt")["state_dict"] for run in ("killed", "whole"))
    torch.testing.assert_close(weights, wanted, rtol=0, atol=0)


def losses(file: Path) -> list[list]:
    """The number and the loss of each batch that a process computed."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_cannot_be_divided_is_refused(folder: Path) -> None:
    number, attention = (folder / "errors.txt").read_text().splitlines()
    assert "context_parallel_size: expected a divisor of the number of processes, got 3 of 4" in number
    assert "attention: expected dma or swa" in attention
    with pytest.raises(ValueError, match="context_parallel_size: expected at least 1, got 0"):
        FullyShardedStrategy(context_parallel_size=0)


def test_parts_of_a_batch() -> None:
    groups, tokens = [ContextGroup("", rank, 2) for rank in range(2)], torch.arange(10).view(2, 5)
    batch = {"input_ids": tokens, "labels": tokens + 1, "label_bytes": torch.tensor([3, 4])}
    first, second = (part_of_batch(batch, group) for group in groups)
    assert first["labels"].tolist() == [[1, 2, 3], [6, 7, 8]]
    assert second["labels"].tolist() == [[4, 5, -100], [9, 10, -100]]
    assert second["padding"].tolist() == [[False, False, True]] * 2
    assert (first["label_bytes"] + second["label_bytes"]).tolist() == [3, 4]
    assert first["label_bytes"].tolist() == [3, 4]
    even = part_of_batch({name: x[:, :4] for name, x in batch.items() if x.ndim == 2}, groups[1])
    assert even.keys() == {"input_ids", "labels"}
    with pytest.raises(
        ValueError, match=r"expected text where processes divide sequences .* got examples with answers"
    ):
        part_of_batch(batch | {"is_answer": torch.ones(2, dtype=torch.bool)}, groups[0])


def test_monitors_that_need_whole_sequences_are_refused() -> None:
    from dma_lightning.monitoring import FarCopyMonitor

    module = LanguageModel()
    check_whole_sequences(FarCopyMonitor(4), module)
    module.model.join_context(ContextGroup("", 0, 2))
    with pytest.raises(ValueError, match="FarCopyMonitor: expected whole sequences, got parts in 2 processes"):
        FarCopyMonitor(4).on_validation_start(None, module)
