"""Figures on a GPU equal those on the CPU, and the GPU's memory is measured."""

import pytest
import torch
from small_models import ATTENTIONS, TASK, make_model

from dma_lightning.evaluation import NeedleGrid, Reader, needle_cells
from dma_lightning.evaluation.continuations import Pair, likelihoods

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_needles_on_a_gpu(attention: str) -> None:
    grid = NeedleGrid((0, 50, 100), examples=20, batch_size=16)
    found = {}
    for device in ("cpu", "cuda"):
        model = make_model(attention, torch.float32, backend="auto", head_dim=16).to(device)
        found[device] = needle_cells(Reader(model, device, chunk_size=25), TASK, 57, grid)
    for cpu, gpu in zip(found["cpu"].cells, found["cuda"].cells, strict=True):
        assert gpu.loss == pytest.approx(cpu.loss, rel=1e-3)
        assert gpu.accuracy == pytest.approx(cpu.accuracy, abs=0.02)  # of 60 labels, one may be a near tie
    assert found["cuda"].cost.peak_memory_bytes > found["cuda"].cost.cache_bytes == found["cpu"].cost.cache_bytes > 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_likelihoods_on_a_gpu(attention: str) -> None:
    tokens = torch.randint(TASK.vocab_size, (5, 70), generator=torch.Generator().manual_seed(1)).tolist()
    pairs = [Pair(tuple(row[: 9 * i + 1]), tuple(row[60:])) for i, row in enumerate(tokens)]
    found = {}
    for device in ("cpu", "cuda"):
        model = make_model(attention, torch.float32, backend="auto", head_dim=16).to(device)
        found[device] = [nats for nats, _ in likelihoods(Reader(model, device, chunk_size=25), pairs, batch_size=3)]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)
