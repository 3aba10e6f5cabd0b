"""The forward kernel for Hopper: compiled anywhere, compared on a Hopper GPU; choice of the kernel; counts of tiles.

B batch, H query heads, G KV heads, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels import Lifetimes, SegmentSlots, segment_attention

pytest.importorskip("triton")
import triton

from dma_kernels.attention.kernels import choose_forward
from dma_kernels.attention.kernels.forward import launch_forward
from dma_kernels.segments.tile_counts import launch_count_tiles

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
needs_gluon = pytest.mark.skipif(choose_forward.hopper_forward() is None, reason="needs a Triton that it ran on")


@needs_gluon
def test_it_compiles_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own, since Triton's interpreter, on in this one, does not know Gluon."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_hopper.py")
    done = subprocess.run(
        [sys.executable, str(script), "bf16,128,4", "fp16,64,1", "bf16,128,64"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()[-3:]]
    assert len(kernels) == 3
    for found in kernels:
        assert 0 < found["shared"] <= 227 << 10  # of a core
        assert found["products"] > 0
        assert found["bytes"] > 0


def make_slots(length: int, window: int, kv_heads: int, device: str) -> tuple[Lifetimes, SegmentSlots]:
    """Keys that live in several segments, with documents, padding and sinks; some queries see nothing."""
    ranks = torch.randn(2, kv_heads, length, device=device)
    documents = torch.arange(length, device=device).expand(2, -1) // 333
    padding = torch.rand(2, length, device=device) < 0.1
    padding[:, 100:140] = True
    padding[0, :40] = True
    mask = Lifetimes.top_w(ranks, window, documents=documents, padding=padding, keep_last=8, sinks=4)
    return mask, SegmentSlots.of(mask, 2, kv_heads)


@pytest.mark.parametrize(("positions", "block_k"), [(32, 128), (128, 64), (2, 128)])
def test_counts_of_tiles(positions: int, block_k: int, device: str) -> None:
    _, slots = make_slots(700, 200, 2, device)
    segment, keys = slots.segment_length, slots.birth.shape[2]
    snapshot = keys - segment
    with poisoned_buffers():
        found = launch_count_tiles(
            slots.birth, slots.death, segment_length=segment, positions=positions, block_k=block_k
        )
    seen = slots.visible().unflatten(2, (-1, positions))  # [Z, G, tiles, positions, K]
    every, some = seen.all(3), seen.any(3)
    for part, full, more in ((slice(0, snapshot), 0, 2), (slice(snapshot, keys), 1, 3)):
        unmasked = every[..., part].long().cumprod(-1).sum(-1) // block_k  # seen by all from the beginning on
        assert torch.equal(found[..., full].long(), unmasked)
        last = (some[..., part] * torch.arange(1, part.stop - part.start + 1, device=device)).amax(-1)
        behind = -(-last // block_k) - unmasked
        assert (found[..., more] >= behind).all()  # own keys that were born and have died count
        if part.start == 0:
            assert torch.equal(found[..., more].long(), behind)
    assert (found.sum(-1) > 0).all()
    assert (found[..., 1::2].sum(-1) * block_k <= segment).all()


def test_other_machines_and_versions_take_the_other_kernel(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    choose_forward.hopper_forward.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert choose_forward.hopper_forward() is None
            assert choose_forward.hopper_forward() is None
        assert [x.message for x in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
        assert "3.99.0" in caplog.text
    finally:
        choose_forward.hopper_forward.cache_clear()


@needs_gluon
def test_what_it_can_take() -> None:
    can_take = choose_forward.hopper_forward().can_take
    q = torch.empty(1, 4, 128, 128, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    assert can_take(q, 4, 128, 256) == ON_HOPPER
    assert not can_take(q, 3, 128, 256)
    assert not can_take(q, 4, 32, 256)
    assert not can_take(q, 4, 128, 130)
    assert not can_take(q.float(), 4, 128, 256)
    assert not can_take(q[..., :96], 4, 128, 256)


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the error relative to the norm of the expected tensor."""
    return ((found.double() - exact).norm() / exact.norm()).item()


@needs_hopper
@needs_gluon
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("group", "length", "window"), [(1, 700, 64), (2, 1300, 200), (4, 257, 1000), (64, 300, 40)])
def test_it_is_as_exact_as_the_other(
    group: int, length: int, window: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    mask, slots = make_slots(length, window, 2, device)
    q, k, v = (
        torch.randn(2, length, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for heads in (2 * group, 2, 2)
    )
    bias = torch.randn(2, 2, length, device=device)
    keys, lives = (slots.gather(k), slots.gather(v)), (slots.birth, slots.death)
    bias_by_slot = slots.gather_biases(bias)
    in_base_2 = bias_by_slot * 1.4426950408889634
    sizes = {"scale": head_dim**-0.5, "segment_length": slots.segment_length}
    exact, lse = segment_attention(*(x.double() for x in (q, k, v, bias)), mask, return_lse=True)
    with poisoned_buffers():
        found = choose_forward.hopper_forward().launch_hopper_forward(q, *keys, in_base_2, *lives, **sizes)
        again = choose_forward.hopper_forward().launch_hopper_forward(q, *keys, in_base_2, *lives, **sizes)
    other = launch_forward(q, *keys, bias_by_slot, *lives, **sizes)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    sees = lse > -torch.inf
    assert torch.equal(found[1] > -torch.inf, sees)
    assert found[0].isfinite().all()
    assert not found[0][~sees].any()
    assert relative(found[0], exact) <= 1.1 * relative(other[0], exact)
    assert relative(found[1][sees] / 1.4426950408889634, lse[sees]) <= 1e-6
