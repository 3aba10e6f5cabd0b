"""The attention module: equal to sliding-window attention at A = 0, to its definition elsewhere, and causal."""

import logging

import masks
import pytest
import torch
import torch.nn.functional as F
from large_tiles import enlarge_attention_tiles
from torch import Tensor

from dma_kernels import KeepRule, Lifetimes, key_ranks
from dma_lightning import DynamicMaskAttention
from dma_lightning.backends import ATTENTIONS, _auto_backend, attend, resolve_backend
from dma_lightning.config import ModelConfig
from dma_lightning.model import DogeForCausalLM
from dma_lightning.rotary import apply_rope


def make_module(backend: str = "torch", **changed: object) -> DynamicMaskAttention:
    """A module in float64 with a non-trivial selection."""
    torch.manual_seed(1)
    arguments = {"num_heads": 4, "num_kv_heads": 2, "keep_window_size": 9, "backend": backend} | changed
    module = DynamicMaskAttention(32, **arguments).double()
    torch.nn.init.normal_(module.A)
    torch.nn.init.normal_(module.dt_proj.weight)
    return module


def live_sets(module: DynamicMaskAttention, x: Tensor) -> Tensor:
    """The module's dense mask for an input."""
    values = module.v_proj(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    return Lifetimes.top_w(key_ranks(values, module.A, module.dt_proj.weight), module.keep.window).to_dense()


@pytest.mark.parametrize("window", [1, 7, 62, 63, 68])
def test_starts_as_sliding_window_attention(window: int) -> None:
    module = DynamicMaskAttention(32, num_heads=4, num_kv_heads=2, keep_window_size=window, backend="torch")
    x, position = torch.randn(2, 63, 32), torch.arange(63)
    band = (position <= position[:, None]) & (position > position[:, None] - window)
    q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    q, k = apply_rope(module.q_norm(q), 10_000.0), apply_rope(module.k_norm(k), 10_000.0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)
    expected = module.o_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", [{}, {"keep_last": 2, "sinks": 1}, {"score_form": "linear"}, {"num_kv_heads": 1}])
def test_equals_its_definition_in_every_gradient(changed: dict[str, object]) -> None:
    x = torch.randn(2, 111, 32, dtype=torch.float64)
    documents, padding = masks.make_documents(2, 111), torch.rand(2, 111) < 0.2
    results = []
    for backend in ("torch", "reference"):
        module, leaf = make_module(backend, **changed), x.clone().requires_grad_()
        out = module(leaf, documents, padding)
        out.sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [1, 16, 50, 110])
def test_the_future_changes_nothing(t: int) -> None:
    module, x = make_module(), torch.randn(2, 111, 32, dtype=torch.float64)
    changed = torch.cat([x[:, :t], torch.randn_like(x[:, t:])], dim=1)
    assert torch.equal(live_sets(module, x)[:, :, :t], live_sets(module, changed)[:, :, :t])
    torch.testing.assert_close(module(x)[:, :t], module(changed)[:, :t], rtol=1e-12, atol=1e-12)

    x.requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[:, :t].sin().sum(), x)
    assert (grad[:, t:] == 0).all()
    assert (grad[:, :t] != 0).any()


def test_documents_equal_separate_runs() -> None:
    module, x = make_module(keep_last=2, sinks=1), torch.randn(1, 70, 32, dtype=torch.float64)
    documents = torch.tensor([[0] * 25 + [1] * 45])
    packed = module(x, documents)
    # RoPE is relative, so positions may start anywhere.
    apart = torch.cat([module(x[:, :25]), module(x[:, 25:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)


def test_left_padding_equals_the_sequence_alone() -> None:
    module, x = make_module(), torch.randn(1, 40, 32, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, 13, 32, dtype=torch.float64), x], dim=1)
    out = module(padded, padding=torch.arange(53)[None] < 13)
    torch.testing.assert_close(out[:, 13:], module(x), rtol=1e-9, atol=1e-9)


def test_nan_shows_in_the_output() -> None:
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    x[0, 20] = torch.nan
    assert make_module()(x)[0, 39].isnan().all()


def test_selection_under_autocast_is_that_of_float32_scores() -> None:
    module, x = make_module().float(), torch.randn(2, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(out.float(), module(x), rtol=0.1, atol=0.1)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    _auto_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="dma_lightning"):
        for _ in range(3):
            make_module("auto")(torch.randn(1, 20, 32, dtype=torch.float64))
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'auto': using 'torch' for head dim 8 in torch.float64 on cpu"
    ]
    assert resolve_backend("torch", "cuda", 0, torch.bfloat16, 64) == "torch"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_auto_takes_what_can_and_has_been_tested(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr("dma_lightning.backends.has_triton", lambda: True)
    _auto_backend.cache_clear()
    tested = capability == (9, 0)
    assert resolve_backend("auto", "cuda", 0, torch.bfloat16, 64) == ("triton" if tested else "flex")
    assert resolve_backend("auto", "cuda", 0, torch.float32, 8) == ("triton" if tested else "torch")
    assert resolve_backend("auto", "cuda", 0, torch.float64, 64) == "torch"
    assert resolve_backend("auto", "cuda", 0, torch.bfloat16, 272) == "torch"
    assert resolve_backend("auto", "cuda", 0, torch.bfloat16, 64, drifts=True) == "triton"  # flex trains no drift
    monkeypatch.setattr("dma_lightning.backends.has_triton", lambda: False)
    _auto_backend.cache_clear()
    assert resolve_backend("auto", "cuda", 0, torch.bfloat16, 64, drifts=True) == "torch"
    _auto_backend.cache_clear()


@pytest.mark.parametrize("changed", [{}, {"keep_last": 2, "sinks": 1}])
def test_fast_backends_equal_torch(changed: dict[str, object], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        enlarge_attention_tiles(monkeypatch)
    x, documents = torch.randn(2, 150, 64, device=device), masks.make_documents(2, 150).to(device)
    padding = torch.rand(2, 150, device=device) < 0.2
    results = []
    for backend in ("torch", "triton", "flex"):
        torch.manual_seed(1)
        module = DynamicMaskAttention(64, 4, 2, keep_window_size=9, backend=backend, **changed).to(device)
        torch.nn.init.normal_(module.A)
        trains = device == "cuda" or backend != "flex"
        with torch.set_grad_enabled(trains):
            out = module(x, documents, padding)
        results.append([out])
        if trains:
            results[-1] += torch.autograd.grad(out.sin().sum(), list(module.parameters()))
    for fast in results[1:]:
        assert len(fast) in (1, len(results[0]))
        for found, expected in zip(fast, results[0], strict=len(fast) > 1):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "flex", "auto"])
def test_whole_model_in_one_graph(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward on a CPU, forward and backward on a GPU."""
    if device == "cpu" and backend == "triton":
        enlarge_attention_tiles(monkeypatch)
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, keep_window_size=20, backend=backend,
    )  # fmt: skip
    model = DogeForCausalLM(config).to(device)
    for name, parameter in model.named_parameters():
        if name.endswith(".A"):
            torch.nn.init.normal_(parameter)
    tokens, train = torch.randint(0, 64, (2, 150), device=device), device == "cuda" or backend == "triton"
    # Inductor's C++ takes a minute to compile; whether there is one graph shows without it.
    compiler = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=compiler)
    with torch.set_grad_enabled(train):
        expected, found = (m(tokens) for m in (model, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        if train:
            parameters = list(model.parameters())
            gradients = [torch.autograd.grad(x.sin().sum(), parameters) for x in (found, expected)]
            for x, y in zip(*gradients, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_flex_refuses_to_train_on_a_cpu() -> None:
    module = DynamicMaskAttention(64, 4, 2, backend="flex")
    with pytest.raises(ValueError, match="use backend 'torch' to train here"):
        module(torch.randn(1, 20, 64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_heads": 5, "num_kv_heads": 5}, "hidden_size must be a multiple of num_heads, got 32 and 5; or set"),
        ({"head_dim": 7}, "head_dim: rotary embedding needs an even number >= 2, got 7"),
        ({"keep_window_size": 0}, "keep_window_size: expected at least 1"),
        ({"score_form": "relu"}, "score_form: expected one of"),
        (
            {"backend": "flash"},
            r"backend: expected one of \['auto', 'triton', 'flex', 'torch', 'reference'\], got 'flash'",
        ),
    ],
)
def test_bad_arguments(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**changed)


def test_bad_inputs() -> None:
    module = make_module()
    with pytest.raises(ValueError, match=r"expected x \[B, N >= 1, 32\], got \[2, 5, 31\]"):
        module(torch.zeros(2, 5, 31, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got \[2, 0, 32\]"):
        module(torch.zeros(2, 0, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected x torch\.float64 on cpu as the weights, got torch\.float32 on cpu"):
        module(torch.zeros(2, 5, 32))
    with pytest.raises(ValueError, match=r"got torch\.float64 on meta"):
        module(torch.zeros(2, 5, 32, dtype=torch.float64, device="meta"))
    with pytest.raises(ValueError, match="documents: expected shape"):
        module(torch.zeros(2, 5, 32, dtype=torch.float64), documents=torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_backends_take_a_query_bias(backend: str, device: str) -> None:
    q, k, v = (torch.randn(2, heads, 40, 16, device=device) for heads in (4, 2, 2))
    ranks, query_bias = torch.randn(2, 2, 40, device=device), torch.randn(2, 2, 40, device=device, requires_grad=True)
    keep = KeepRule(9)
    expected = attend(backend, q, k, v, ranks, ranks, keep)
    by_name = ATTENTIONS[backend](q, k, v, ranks, Lifetimes.selected(ranks, keep), query_bias=query_bias)
    for out in (attend(backend, q, k, v, ranks, ranks, keep, query_bias=query_bias), by_name):
        (found,) = torch.autograd.grad(out.square().sum(), query_bias)
        assert torch.equal(out, expected)
        assert 0 < found.abs().max() < 1e-4  # rounding


@pytest.mark.parametrize(("last", "length", "dropped"), [(0, 7, False), (0, 8, True), (6, 13, False), (6, 14, True)])
def test_says_where_no_key_is_dropped(last: int, length: int, dropped: bool) -> None:
    module = DynamicMaskAttention(16, 2, keep_window_size=7, keep_last=last)
    lifetimes, _ = module.lifetimes(torch.randn(1, length, 16))
    assert (lifetimes.death < length).any() == dropped
    reason = module.unused_at(length)
    assert reason is None if dropped else f"keep_window_size 7{' + keep_last 6' * (last > 0)} >= sequence" in reason
    module.keep_last = 3
    assert module.own_keep == module.keep
