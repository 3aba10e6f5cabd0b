"""One of four processes that hold parts of the same sequences, all together or in pairs; started by `test_context.py`.

    python context_processes.py FOLDER

Results are written to the folder. The test compares them with the definition.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from context_cases import Case, cases, draw
from torch import Tensor

from dma_kernels import Lifetimes, reference_attention, segment_attention
from dma_kernels.context import (
    ContextGroup,
    ExtendedKeys,
    PartPacking,
    drift_before,
    exchange_keys,
    exchange_window,
    traffic,
)
from dma_kernels.context.collectives import gather_parts
from dma_kernels.fixed_point import drift_sums, drifted_ranks
from dma_kernels.units import UNIT

PROCESSES = 4
COMPILED = next(case for case in cases() if case.parts == PROCESSES and case.drift and case.documents == "ids")


def results(case: Case, group: ContextGroup, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Output of this part by `attended`, compiled or not, and the gradients of the part's trained tensors."""
    drawn = draw(case)
    q, k, v, bias, steps = (group.part(x.detach(), 2).requires_grad_() for x in drawn.trained)
    documents = None if drawn.documents is None else group.part(drawn.documents, fill=7)
    padding = group.padding(case.length)
    if drawn.padding is not None:
        padding = group.part(drawn.padding, fill=True)
    elif padding is not None:
        padding = padding.expand(len(q), -1)
    out = forward(case, group, q, (k, v, bias), group.part(drawn.content, 2), steps, (documents, padding))
    trained = [q, k, v, bias] + [steps] * (case.drift > 0)
    return [out, *torch.autograd.grad(out, trained, group.part(drawn.out_gradient, 2))]


def attended(
    case: Case,
    group: ContextGroup,
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    content: Tensor,
    steps: Tensor,
    packed: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """The output of a part."""
    packing = group.pack(*packed)
    if case.window is not None:
        extended, query_bias = exchange_window(group, keys, case.window, packing), None
    else:
        extended, query_bias = exchanged(case, group, keys, content, steps, packing)
    return extended.attend(segment_attention, q, query_bias)


def exchanged(
    case: Case,
    group: ContextGroup,
    keys: tuple[Tensor, Tensor, Tensor],
    content: Tensor,
    steps: Tensor,
    packing: PartPacking | None,
) -> tuple[ExtendedKeys, Tensor | None]:
    """Keys with their drift, as a layer makes them."""
    if not case.drift:
        return exchange_keys(group, keys, content, case.keep, packing), None
    if packing is not None and packing.padding is not None:
        steps = steps.masked_fill(packing.padding[:, None], 0)
    units = drift_sums(steps.detach())
    total = units[..., -1]
    start, start_nats = drift_before(group, total, total.double() * UNIT + _without_value(steps.sum(-1)))
    nats = units.double() * UNIT + _without_value(steps.cumsum(-1)) + start_nats[..., None]
    k, v, bias = keys
    ranks = drifted_ranks(content, drift_sums(steps.detach(), start))
    return exchange_keys(group, (k, v, bias + nats), ranks, case.keep, packing), -nats


def _without_value(x: Tensor) -> Tensor:
    return x - x.detach()


def gathered(group: ContextGroup) -> list[Tensor]:
    """Tensors of many dtypes and shapes, gathered by all processes, and gradients of those that can have one."""
    torch.manual_seed(group.rank)
    halves, wide = (
        torch.randn(3, 5).bfloat16().mT.requires_grad_(),
        torch.randn(2, dtype=torch.float64).requires_grad_(),
    )
    others = torch.randint(9, (3,), dtype=torch.int8), torch.randn(0, 2), torch.tensor(group.rank), torch.tensor([True])
    parts = gather_parts([halves, wide, *others], group.name, group.size)
    weight = 1 + torch.arange(group.size)[:, None] / (128 if group.rank else 1)  # such sums are none of bfloat16
    loss = (parts[0] * weight[..., None]).sum() + (parts[1] * weight).square().sum()
    return [*(part.detach() for part in parts), *torch.autograd.grad(loss, (halves, wide))]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Lifetimes, query_bias: Tensor | None
) -> Tensor:
    """Attention by the definition. A NaN in a key would spread in it, even if no query sees the key."""
    return reference_attention(q, k, v, bias, mask.to_dense(), query_bias=query_bias)


def not_finite(group: ContextGroup) -> list[Tensor]:
    """Output and gradients of a part where a key and a value of the last part are NaN."""
    drawn = draw(Case(group.size, 64))
    q, k, v, bias = (group.part(x.detach(), 2).requires_grad_() for x in drawn.trained[:4])
    spoiled = [x.masked_fill(torch.tensor(group.rank == group.size - 1), torch.nan) for x in (k, v)]
    extended = exchange_keys(group, (*spoiled, bias), group.part(drawn.content, 2), Case(1, 1).keep)
    out = extended.attend(dense_attention, q)
    return [out, *torch.autograd.grad(out, (q, k, v, bias), group.part(drawn.out_gradient, 2))]


def main(folder: Path) -> None:
    """Run all cases of four processes, and those of two, which are divided between the pairs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    groups = {PROCESSES: ContextGroup.of(dist.group.WORLD), 2: ContextGroup.of(pairs[rank // 2])}
    found = {}
    for number, case in enumerate(cases()):
        if case.parts == PROCESSES or number % 2 == rank // 2:
            found[case.name] = results(case, groups[case.parts], attended)
    before = traffic.bytes
    found["gathered"] = gathered(groups[PROCESSES])
    found["bytes"] = traffic.bytes - before
    found["not finite"] = not_finite(groups[PROCESSES])
    compiled = torch.compile(attended, backend="eager", fullgraph=True)
    found["compiled"] = results(COMPILED, groups[PROCESSES], compiled)
    try:
        ContextGroup.of(pairs[1 - rank // 2])
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
