"""The retention loss equals its definition, pair by pair. Only content gets a gradient."""

import copy
from collections.abc import Callable

import masks
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dma_kernels import KeepRule, Packing
from dma_lightning.auxiliary_losses import with_auxiliary_loss
from dma_lightning.mixers.retention import FLOOR, RetentionQueries, fused_retention_loss, retention_loss

CASES = [*masks.CASES, masks.Case(documents=True, padding="right", keep_last=5, sinks=2)]


def values_like(k: Tensor) -> Tensor:
    """Values in the shape of keys, with norms that differ from key to key."""
    return torch.randn_like(k) * torch.rand_like(k[..., :1]).exp()


def inputs(length: int, kv_heads: int = 2, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries of four heads, keys, content and drift."""
    q, k = torch.randn(batch, 4, length, 8), torch.randn(batch, kv_heads, length, 8)
    content = 2 * torch.randn(batch, kv_heads, length)
    drift = (0.2 * torch.rand(batch, kv_heads, length)).cumsum(-1)
    return [x.to(dtype) for x in (3 * q, k, content, drift)]


def defined(
    q: Tensor, k: Tensor, content: Tensor, drift: Tensor, positions: Tensor, keep: KeepRule, packing: Packing | None,
    values: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss by its formula, query by query and key by key."""
    (batch, kv_heads, length), group = content.shape, q.shape[1] // k.shape[1]
    runs = torch.zeros(batch, length) if packing is None or packing.runs is None else packing.runs
    padding = torch.zeros(batch, length) if packing is None or packing.padding is None else packing.padding
    of_groups = []
    for g in range(kv_heads):
        loss, mass = torch.zeros((), dtype=q.dtype), 0.0
        for b in range(batch):
            for t in positions.tolist():
                past = [j for j in range(t + 1) if runs[b, j] == runs[b, t] and not padding[b, j]]
                far = [j for j in past[keep.sinks :] if t - j >= max(keep.last, keep.window // 4)]
                if padding[b, t] or not far:
                    continue
                attended = torch.zeros(length, dtype=q.dtype)
                for h in range(g * group, (g + 1) * group):
                    logits = q[b, h, t] @ k[b, g, past].T * 8**-0.5 + drift[b, g, past] - drift[b, g, t]
                    share = logits.softmax(-1)
                    if values is not None:
                        v = values[b, g, past]
                        share = share * torch.stack([(x - v.mean(0)).norm() for x in v])
                        share = share / share.sum() if share.sum() else share  # a key alone changes nothing
                    attended[past] += share / group
                log_p = (content[b, g, far] + drift[b, g, far]).log_softmax(-1)
                loss = loss - (attended[far] * log_p).sum()
                mass += attended[far].sum() + FLOOR
        of_groups.append(loss / mass if mass else loss)
    return torch.stack(of_groups).mean()


@pytest.mark.parametrize("target", ["attention", "output"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("length", "window", "kv_heads"), [(63, 7, 2), (111, 24, 4), (111, 1, 1), (257, 60, 2)])
def test_equals_its_definition(case: masks.Case, length: int, window: int, kv_heads: int, target: str) -> None:
    sizes = case.arguments(2, length)
    packing = Packing.of(sizes["documents"], sizes["padding"])
    keep = KeepRule(window, case.keep_last, case.sinks)
    q, k, content, drift = inputs(length, kv_heads)
    values = values_like(k) if target == "output" else None
    positions = RetentionQueries(window, 16).at(3, length)
    results = []
    for loss_of in (retention_loss, defined):
        leaf = content.clone().requires_grad_()
        loss = loss_of(q, k, leaf, drift, positions, keep, packing, values)
        results.append([loss, torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["attention", "output"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_loss_is_the_same(case: masks.Case, target: str, device: str) -> None:
    """The kernels have tests of their own; here, what documents, padding, sinks and last positions mean to them."""
    pytest.importorskip("triton")
    sizes = case.arguments(2, 63)
    packing = Packing.of(*(None if x is None else x.to(device) for x in (sizes["documents"], sizes["padding"])))
    keep, positions = KeepRule(7, case.keep_last, case.sinks), RetentionQueries(7, 16).at(3, 63, device)
    q, k, content, drift = (x.to(device) for x in inputs(63, dtype=torch.float32))
    values = values_like(k) if target == "output" else None
    results = []
    for loss_of, dtype in ((fused_retention_loss, torch.float32), (retention_loss, torch.float64)):
        *tensors, leaf = (x if x is None else x.to(dtype) for x in (q, k, drift, values, content))
        leaf = leaf.clone().requires_grad_()
        loss = loss_of(*tensors[:2], leaf, tensors[2], positions, keep, packing, tensors[3])
        results.append([loss.double(), torch.autograd.grad(loss, leaf)[0].double()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Whatever autocast says, from the same inputs comes the same loss; drifts of float64 lose nothing."""
    q, k, content, drift = inputs(257, dtype=dtype)
    drift, positions, keep = drift.double() + 1e6, RetentionQueries(60).at(0, 257), KeepRule(60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = retention_loss(q, k, content.float(), drift, positions, keep)
    expected = retention_loss(q.double(), k.double(), content.double(), drift, positions, keep)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_gradients_are_those_of_content_alone() -> None:
    q, k, content, drift = (x.requires_grad_() for x in inputs(63, batch=1))
    positions, keep = RetentionQueries(9, 8).at(0, 63), KeepRule(9, sinks=1)
    found = torch.autograd.grad(
        retention_loss(q, k, content, drift, positions, keep), (q, k, content, drift), allow_unused=True
    )
    assert [x is None for x in found] == [True, True, False, True]
    assert torch.autograd.gradcheck(lambda x: retention_loss(q, k, x, drift, positions, keep), content)


def test_a_constant_content_changes_nothing() -> None:
    q, k, content, drift = inputs(111)
    positions, keep = RetentionQueries(16).at(0, 111), KeepRule(16)
    one, other = (retention_loss(q, k, content + shift, drift, positions, keep) for shift in (0.0, 5.0))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_content_does_not_feed_itself() -> None:
    """The fixed point is finite: where content foresees a target exactly, its gradient is 0."""
    q, k, _, _ = inputs(63, kv_heads=4, batch=1)
    positions, keep = torch.tensor([62]), KeepRule(1)
    content = (q[:, :, 62:] @ k.transpose(-1, -2) * 8**-0.5)[:, :, 0].requires_grad_()
    (grad,) = torch.autograd.grad(retention_loss(q, k, content, None, positions, keep), content)
    assert grad.abs().max() < 1e-12


def test_keys_that_say_what_all_say_do_not_count() -> None:
    """Such as an attention sink with the mean value; nothing is foreseen where all values are alike."""
    q, k, content, _ = inputs(63, kv_heads=4, batch=1)
    positions, keep = torch.tensor([62]), KeepRule(1)
    k[:, :, 0] = q[:, :, 62] / 4  # gets most of the attention
    values = values_like(k)
    values[:, :, 0] = values[:, :, 1:].mean(2)
    content.requires_grad_()

    def pull(v: Tensor | None) -> Tensor:
        loss = retention_loss(q, k, content, None, positions, keep, None, v)
        return -torch.autograd.grad(loss, content)[0]

    assert (pull(None)[..., 0] > 0).all()
    assert (pull(values)[..., 0] < 0).all()
    assert (pull(torch.ones_like(values)) == 0).all()


def test_other_documents_and_padding_change_nothing() -> None:
    length, keep = 111, KeepRule(12, last=4, sinks=1)
    documents, padding = (torch.arange(length) >= 50).long()[None], torch.zeros(1, length, dtype=torch.bool)
    padding[0, 70:80] = padding[0, 105:] = True
    positions, packing = RetentionQueries(60, 20).at(0, length), Packing.of(documents, padding)
    q, k, content, drift = inputs(length, batch=1)
    hidden = padding | (documents == 0)
    others = [torch.where(hidden[:, None], 9.0, x) for x in (content, drift)]
    others = [torch.where(hidden[:, None, :, None], 9.0, x) for x in (q, k)] + others
    results = []
    for one in ([q, k, content, drift], others):
        leaf = one[2].clone().requires_grad_()
        loss = retention_loss(*one[:2], leaf, one[3], positions, keep, packing)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert (results[0][1][hidden[:, None].expand_as(leaf)] == 0).all()

    apart = [x[:, :, 50:] for x in (q, k, content, drift)]  # the second document by itself
    alone = retention_loss(*apart, positions - 50, keep, Packing.of(padding=padding[:, 50:]))
    torch.testing.assert_close(results[0][0], alone, rtol=1e-10, atol=0)


@pytest.mark.parametrize("nothing", ["short", "padded", "documents"])
def test_nothing_far_is_a_loss_of_zero(nothing: str) -> None:
    q, k, content, drift = inputs(63)
    content.requires_grad_()
    positions = RetentionQueries(63 if nothing == "short" else 7).at(0, 63)
    padding = torch.ones(2, 63, dtype=torch.bool) if nothing == "padded" else None
    documents = torch.arange(63).expand(2, -1) if nothing == "documents" else None
    loss = retention_loss(q, k, content, drift, positions, KeepRule(7), Packing.of(documents, padding))
    loss.backward()
    assert loss == 0
    assert (content.grad == 0).all()


@pytest.mark.parametrize(("length", "window"), [(257, 60), (111, 110), (111, 7), (63, 1), (4096, 512)])
def test_positions_are_one_in_each_part(length: int, window: int) -> None:
    queries, state = RetentionQueries(window, 64), torch.get_rng_state()
    seen: set[int] = set()
    for step in range(200):
        found = queries.at(step, length)
        count, width = min(64, length - window), (length - window) / min(64, length - window)
        assert len(found) == len(found.unique()) == count
        part = window + torch.arange(count) * width
        assert (found >= part.floor()).all()
        assert (found < part + 2 * width).all()
        assert found.max() < length
        seen.update(found.tolist())
    assert len(seen) >= 0.9 * (length - window)
    assert torch.equal(torch.get_rng_state(), state)


def test_positions_are_those_of_seed_and_step() -> None:
    queries = RetentionQueries(512, 4)  # of 896 positions each, u = 0.326 = 7 · 0.618… - 4
    assert queries.at(7, 4096).tolist() == queries.at(torch.tensor(7), 4096).tolist() == [804, 1700, 2596, 3492]
    assert not torch.equal(queries.at(7, 4096), queries.at(8, 4096))
    assert not torch.equal(queries.at(7, 4096), RetentionQueries(512, 4, seed=1).at(7, 4096))
    last = 2**31 - 1
    assert torch.equal(queries.at(last, 4096), queries.at(torch.tensor(last), 4096))


class Layer(nn.Module):
    """A layer that calls the loss as a mixer does."""

    def __init__(self, loss_of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss_of = loss_of
        self.q, self.k, self.content = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 2)
        self.queries, self.keep = RetentionQueries(24, 16), KeepRule(24, last=8, sinks=2)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        q, k = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k))
        content = self.content(x).transpose(1, 2)
        drift = torch.full_like(content, 0.1).cumsum(-1)
        positions = self.queries.at(self.step, x.shape[1], x.device)
        loss = self.loss_of(q, k, content, drift, positions, self.keep, packing)
        return with_auxiliary_loss(x * k.mean(), loss, 0.3)


@pytest.mark.parametrize("loss_of", [retention_loss, fused_retention_loss])
def test_a_compiled_layer_goes_on_from_step_to_step(loss_of: Callable[..., Tensor], device: str) -> None:
    pytest.importorskip("triton")
    x, layer = torch.randn(2, 63, 32, device=device), Layer(loss_of).to(device)
    packing = Packing.of(masks.make_documents(2, 63).to(device), torch.rand(2, 63, device=device) < 0.1)
    compiled = copy.deepcopy(layer)
    compiled.compile(backend="aot_eager", fullgraph=True)
    found: list[Tensor] = []
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for one in (layer, compiled):
                one.step.fill_(step)
                one.zero_grad()
                checkpoint(one, x, packing, use_reentrant=False).sum().backward()
        torch.testing.assert_close([p.grad for p in compiled.parameters()], [p.grad for p in layer.parameters()])
        found.append(layer.content.weight.grad.clone())
    assert found[0].norm() > 1e-3
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drift": torch.zeros(2, 2, 62)}, r"drift: expected \[2, 2, 63\]"),
        ({"positions": torch.tensor([8.0])}, "positions: expected int64"),
        ({"values": torch.zeros(2, 2, 62, 8)}, r"values: expected \[2, 2, 63\] .* plus a last dimension"),
        ({"content": torch.zeros(2, 1, 63)}, r"key_bias: expected|content: expected"),
        ({"packing": Packing(padding=torch.zeros(2, 62, dtype=torch.bool))}, "padding: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    names = ("q", "k", "content", "drift")
    arguments = dict(zip(names, inputs(63), strict=True)) | {"positions": torch.tensor([8]), "keep": KeepRule(7)}
    with pytest.raises(ValueError, match=message):
        retention_loss(**arguments | changed)
    with pytest.raises(ValueError, match=r"computes in float32, bfloat16 or float16, got torch\.float64"):
        fused_retention_loss(**arguments)
    with pytest.raises(ValueError, match="window: expected at least 1"):
        RetentionQueries(0)
