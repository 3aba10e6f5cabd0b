"""Generated masks of every kind and composition, each with its definition pair by pair."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from dma_kernels import Lifetimes, reference_mask


@dataclass(frozen=True)
class Context:
    """What all parts of a composed mask share."""

    batch: int
    heads: int
    length: int
    documents: Tensor | None
    padding: Tensor | None

    @property
    def arguments(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the constructors."""
        return {"documents": self.documents, "padding": self.padding}

    def runs(self) -> Tensor:
        """The number of each position's document, `[B, N]`, counted position by position."""
        runs = torch.zeros(self.batch, self.length, dtype=torch.long)
        for b in range(self.batch):
            run, current = 0, None
            for t in range(self.length):
                real = self.padding is None or not self.padding[b, t]
                if real and self.documents is not None:
                    run += current is not None and self.documents[b, t].item() != current
                    current = self.documents[b, t].item()
                runs[b, t] = run
        return runs

    def allowed(self) -> Tensor:
        """Which pairs are causal, of one document, and not padded, `[B, 1, N, N]`."""
        position, runs = torch.arange(self.length), self.runs()
        allowed = (position <= position[:, None]) & (runs[:, None, :] == runs[:, :, None])
        if self.padding is not None:
            allowed = allowed & ~self.padding[:, None, :]
        return allowed[:, None]


@st.composite
def contexts(draw: st.DrawFn, lengths: st.SearchStrategy[int]) -> Context:
    """Draw sizes, documents and padding. Tensors come from a seeded torch generator."""
    batch, heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(lengths)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    documents = padding = None
    if draw(st.booleans()):
        starts = torch.rand(batch, length) < draw(st.sampled_from([0.02, 0.2, 0.9]))
        documents = starts.long().cumsum(-1) % 3
    if draw(st.booleans()):
        padding = torch.rand(batch, length) < draw(st.sampled_from([0.1, 0.6, 1.0]))
    return Context(batch, heads, length, documents, padding)


@st.composite
def parts(draw: st.DrawFn, c: Context) -> tuple[Lifetimes, Tensor]:
    """One mask and its definition, `[B or 1, G or 1, N, N]`."""
    kind = draw(st.sampled_from(["causal", "sliding_window", "last", "sinks", "top_w", "top_w"]))
    size = draw(st.integers(1, c.length + 2))
    position = torch.arange(c.length)
    if kind == "causal":
        return Lifetimes.causal(c.length, **c.arguments), c.allowed()
    if kind in ("sliding_window", "last"):
        mask = getattr(Lifetimes, kind)(c.length, size, **c.arguments)
        return mask, c.allowed() & (position > position[:, None] - size)
    if kind == "sinks":
        size = draw(st.integers(1, 4))
        pairs = c.allowed()
        earlier = (pairs & (position < position[:, None])).sum(-1)  # real keys of the document before each position
        return Lifetimes.sinks(c.length, size, **c.arguments), pairs & (earlier < size)[..., None, :]
    ranks = torch.randn(c.batch, c.heads, c.length)
    if draw(st.booleans()):
        ranks = (2 * ranks).round()  # ties
    if draw(st.booleans()):
        ranks = ranks + torch.linspace(0, draw(st.sampled_from([-9.0, 9.0])), c.length)
    return Lifetimes.top_w(ranks, size, **c.arguments), reference_mask(ranks, size, **c.arguments)


@st.composite
def masks(draw: st.DrawFn, lengths: st.SearchStrategy[int]) -> tuple[Lifetimes, Tensor]:
    """A mask of one to three parts, united and intersected, and its definition."""
    context = draw(contexts(lengths))
    mask, pairs = draw(parts(context))
    for _ in range(draw(st.integers(0, 2))):
        other, other_pairs = draw(parts(context))
        if draw(st.booleans()):
            mask, pairs = mask | other, pairs | other_pairs
        else:
            mask, pairs = mask & other, pairs & other_pairs
    return mask, pairs


@st.composite
def intervals(draw: st.DrawFn, queries: st.SearchStrategy[int]) -> tuple[Tensor, Tensor, int]:
    """Arbitrary births and deaths, `[B, G, K]`; the number of queries may differ from K."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q_len, keys = draw(queries), draw(queries)
    birth = torch.randint(-3, q_len + 3, (draw(st.integers(1, 2)), draw(st.integers(1, 2)), keys))
    if draw(st.booleans()):
        birth = birth.sort().values // 7 * 7
    death = birth + torch.randint(-2, draw(st.sampled_from([3, 20, 2 * q_len])), birth.shape)
    never = torch.rand(birth.shape) < draw(st.sampled_from([0.0, 0.2]))
    birth, death = (x.masked_fill(never, 2**31 - 1) for x in (birth, death))
    return birth.int(), death.int(), q_len
