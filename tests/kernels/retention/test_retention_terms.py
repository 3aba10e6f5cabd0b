"""The kernels of the retention loss give the same terms as the plain code, which computes them in float64 here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from poison import poisoned_buffers
from torch import Tensor

from dma_kernels.retention.inputs import NO_RUN, TermInputs
from dma_kernels.retention.terms import (
    Terms,
    content_gradient,
    head_terms,
    retention_terms,
    retention_terms_reference,
)

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * ON_GPU]
SIZES = [  # KV heads of four heads, head dim, length, queries
    (4, 16, 1, 1),
    (2, 20, 63, 9),
    (1, 16, 150, 40),  # several parts and tiles of queries
]
if ON_GPU:
    SIZES += [(2, 128, 5000, 64), (4, 256, 600, 64), (1, 64, 20000, 3)]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr("dma_kernels.retention.kernels._PART", 64)


def to(inputs: TermInputs, dtype: torch.dtype) -> TermInputs:
    """A copy with floating-point tensors in another dtype."""
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
    return TermInputs(*(x.to(dtype) if y else x for x, y in zip(inputs, floating, strict=True)))


def make_inputs(
    size: tuple[int, int, int, int], dtype: torch.dtype, device: str, *, values: bool, packed: bool
) -> TermInputs:
    """Keys and values are not contiguous; positions include the first and the last."""
    kv_heads, head_dim, length, queries = size
    q = (2 * torch.randn(2, 4, queries, head_dim)).to(device, dtype)
    k, v = (torch.randn(2, length, kv_heads, head_dim).to(device, dtype).transpose(1, 2) for _ in range(2))
    v = (v * torch.rand(length, 1, device=device).exp()).to(dtype)
    content = 2 * torch.randn(2, kv_heads, length, device=device)
    drift = 1e5 + (20 / length * torch.rand(2, kv_heads, length, device=device)).double().cumsum(-1)
    positions = torch.linspace(0, length - 1, queries, device=device).long()
    runs = None
    if packed:
        own = torch.arange(length).expand(2, -1) // max(1, length // 3)
        own = own.masked_fill(torch.rand(2, length) < 0.2, NO_RUN)
        runs = torch.stack([own, own.masked_fill(torch.rand(2, length) < 0.2, NO_RUN)]).int().to(device)
    return TermInputs(q, k, v if values else None, content, drift, positions, runs, 1 + length // 5)


def found(inputs: TermInputs, terms_of: object = retention_terms) -> list[Tensor]:
    """Terms, and the gradient of content for weights that differ from query to query."""
    leaf = inputs.content.clone().requires_grad_()
    terms: Terms = terms_of(inputs._replace(content=leaf))
    weights = torch.linspace(0.5, 2, terms.fit.numel(), device=leaf.device).view_as(terms.fit)
    (gradient,) = torch.autograd.grad((terms.fit * weights).sum(), leaf)
    return [terms.fit, terms.mass, terms.has_far, gradient]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("values", [False, True], ids=["attention", "output"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_the_plain_code(
    dtype: torch.dtype, size: tuple[int, int, int, int], values: bool, packed: bool, device: str
) -> None:
    inputs = make_inputs(size, dtype, device, values=values, packed=packed)
    with poisoned_buffers():
        *terms, has_far, gradient = found(inputs)
    *expected, expected_far, expected_gradient = found(to(inputs, torch.float64), retention_terms_reference)
    assert torch.equal(has_far, expected_far)
    torch.testing.assert_close([x.double() for x in terms], expected, rtol=1e-4, atol=1e-5)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5 * scale)


def test_without_a_drift(device: str) -> None:
    inputs = make_inputs(SIZES[1], torch.float32, device, values=True, packed=True)._replace(drift=None)
    results = found(inputs), found(to(inputs, torch.float64), retention_terms_reference)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_the_same_bits_in_every_run(device: str) -> None:
    inputs = make_inputs(SIZES[2], torch.float32, device, values=True, packed=True)
    for one, other in zip(found(inputs), found(inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("queries", [0, 3])
def test_without_far_keys(queries: int, device: str) -> None:
    inputs = make_inputs(SIZES[1], torch.float32, device, values=True, packed=False)
    inputs = inputs._replace(q=inputs.q[:, :, :queries], positions=inputs.positions[:queries], distance=63)
    fit, mass, has_far, gradient = found(inputs)
    assert not has_far.any()
    assert not fit.any()
    assert not mass.any()
    assert not gradient.any()


@pytest.mark.parametrize("where", ["q", "k", "values", "content"])
def test_nan_shows(where: str, device: str) -> None:
    inputs = make_inputs(SIZES[1], torch.float32, device, values=True, packed=False)
    broken = getattr(inputs, where).clone()
    broken[:, :, 0] = torch.nan
    assert found(inputs._replace(**{where: broken}))[0].isnan().any()


def test_operations_are_whole(device: str) -> None:
    """As torch.compile needs them: schemas, fake results, and the gradient."""
    inputs = make_inputs(SIZES[1], torch.float32, device, values=True, packed=True)
    inputs = inputs._replace(content=inputs.content.requires_grad_())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(head_terms, tuple(inputs), test_utils=tests)
    with torch.no_grad():
        fit, stats, mean = head_terms(*inputs)
        arguments = (torch.ones_like(fit), *inputs[:-1], stats, mean, inputs.distance)
        torch.library.opcheck(content_gradient, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("asked", ["bf16,128", "fp16,64", "fp32,64"])
def test_they_compile_for_hopper(asked: str) -> None:
    """No GPU is needed. What spills is only little."""
    script = Path(__file__).parent / "compile_retention.py"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), asked], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, kernel in json.loads(done.stdout).items():
        assert kernel["shared"] <= 227 << 10, name
        if "fp32" not in asked:
            assert kernel["stack"] <= 256, name
