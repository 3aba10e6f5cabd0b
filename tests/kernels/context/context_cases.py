"""Sequences that are cut into parts. Every process draws the same ones, and so does the process that checks them."""

from dataclasses import dataclass, replace

import torch
from masks import make_documents, make_padding
from torch import Tensor

from dma_kernels import KeepRule

B, H, G, D = 2, 4, 2, 8
RULE = KeepRule(7)


@dataclass(frozen=True)
class Case:
    """A sequence, the number of its parts, and what its queries see.

    Attributes:
        parts: P, the number of parts.
        length: N, of the whole sequence.
        keep: the rule for which keys are kept.
        window: size of a sliding window instead of the rule.
        documents: `none`; `any`: short ones; `borders`: one begins at each part; `across`: each one reaches from the
            middle of a part to the middle of the next; `ids`: the same, with an id that occurs again.
        padding: as in `masks.make_padding`.
        drift: the largest step in nats; 0 for no drift.
        ties: whether ranks have only a few different values, so that there are ties across all borders.
    """

    parts: int
    length: int
    keep: KeepRule = RULE
    window: int | None = None
    documents: str = "none"
    padding: str = "none"
    drift: float = 0.0
    ties: bool = False

    @property
    def name(self) -> str:
        """The name of the case in a test id."""
        others = {"d": self.documents, "p": self.padding, "drift": self.drift, "ties": self.ties, "swa": self.window}
        told = [f"{name}={value}" for name, value in others.items() if value not in ("none", 0, None)]
        rule = f"{self.keep.window}+{self.keep.last}+{self.keep.sinks}"
        return ",".join([f"P={self.parts}", f"N={self.length}", rule, *told])


@dataclass
class Drawn:
    """The tensors of a case, for the whole sequence, in float64. `content` is the rank without its drift of `steps`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    content: Tensor
    steps: Tensor
    out_gradient: Tensor
    documents: Tensor | None
    padding: Tensor | None

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The tensors that get a gradient."""
        return self.q, self.k, self.v, self.bias, self.steps


def draw(case: Case) -> Drawn:
    """The tensors of a case, the same in all processes."""
    torch.manual_seed(sum(case.name.encode()))
    n = case.length

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    content = normal(B, G, n)
    if case.ties:
        content = content.round()
    documents = _documents(case)
    steps = torch.rand(B, G, n, dtype=torch.float64) * case.drift
    padding = make_padding(case.padding, B, n)
    return Drawn(
        normal(B, H, n, D), normal(B, G, n, D), normal(B, G, n, D), normal(B, G, n), content, steps,
        normal(B, H, n, D), documents, padding,
    )  # fmt: skip


def _documents(case: Case) -> Tensor | None:
    part = -(-case.length // case.parts)
    position = torch.arange(case.length).expand(B, -1)
    if case.documents == "none":
        return None
    if case.documents == "any":
        return make_documents(B, case.length)
    number = (position + (0 if case.documents == "borders" else part // 2)) // part
    return number % 2 if case.documents == "ids" else number + 5


def cases() -> list[Case]:
    """Cases for 2 and 4 processes: rules, kinds of documents and padding, and lengths that do not divide evenly."""
    rules = [KeepRule(1), KeepRule(7), KeepRule(20), KeepRule(200), KeepRule(5, 3), KeepRule(3, 18), KeepRule(4, 0, 2)]
    rules += [KeepRule(3, 2, 20), KeepRule(5, 1, 3)]
    found = []
    for parts, length in ((4, 64), (2, 32)):
        found += [Case(parts, length, rule) for rule in rules]
        both = Case(parts, length, KeepRule(5, 3, 2))
        found += [replace(both, documents=kind) for kind in ("any", "borders", "across", "ids")]
        found += [replace(both, padding=kind) for kind in ("left", "right", "between")]
        found += [replace(both, documents="any", padding=kind, ties=True) for kind in ("left", "right", "between")]
        found += [replace(both, documents="ids", padding="between", drift=0.5)]
        found += [replace(both, ties=True), replace(both, drift=0.5), replace(both, drift=8.0, ties=True)]
        uneven = replace(both, length=length - 3)
        found += [uneven, replace(uneven, documents="any", padding="between", drift=0.1)]
        found += [replace(both, length=parts + 1, keep=KeepRule(2, 2, 1)), replace(both, length=1)]
        window = Case(parts, length, window=9)
        found += [window, replace(window, documents="any", padding="between"), replace(window, length=length - 3)]
        found += [replace(window, window=size, padding="right") for size in (1, 20, 100)]
    return found
