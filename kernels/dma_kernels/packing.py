"""Documents and padding: how rows of a batch are divided into sequences that do not see each other.

B batch, N length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which document each position belongs to, and which positions are padding; made once for a batch, by `of`.

    Attributes:
        documents: integer ids `[B, N]`; a document is a run of equal ids, and its queries see only its own keys. None
            if each row is one document.
        padding: bool `[B, N]`, True at padded positions, which no query sees; None if there are none.
        runs: number of each position's document in its row, int64 `[B, N]`, counted from 0; None without ids.
    """

    documents: Tensor | None = None
    padding: Tensor | None = None
    runs: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.documents is None) != (self.runs is None):
            raise ValueError("expected both documents and runs, got one without the other; use Packing.of")

    @classmethod
    def of(
        cls,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        batch: int | None = None,
        like: Tensor | None = None,
    ) -> "Packing | None":
        """The packing of documents and padding, each `[B, N]` or None; None if both are.

        Args:
            documents: integer ids.
            padding: bool, True at padded positions.
            batch: B. Default: that of the first one given.
            like: a tensor `[..., N]`, whose length and device they must have. Default: the first one given.

        Raises:
            ValueError: on a wrong shape, dtype or device.
        """
        given = documents if documents is not None else padding
        if given is None:
            return None
        batch = (given.shape[0] if given.ndim else 1) if batch is None else batch
        check_packing(documents, padding, batch, given if like is None else like)
        return cls(documents, padding, None if documents is None else document_runs(documents, padding))

    def check_fits(self, batch: int, like: Tensor) -> None:
        """Raise `ValueError` unless this is the packing of `batch` rows with the length and device of `like`."""
        check_packing(self.documents, self.padding, batch, like)


def document_runs(documents: Tensor, padding: Tensor | None) -> Tensor:
    """Number of the document that each position belongs to, int64 `[B, N]`, counted from 0 along the row.

    A padded position belongs to the document of the last real position before it.
    """
    ids = documents
    if padding is not None and documents.shape[-1]:
        position = torch.arange(documents.shape[-1], device=documents.device)
        last_real = position.masked_fill(padding, -1).cummax(-1).values
        ids = documents.gather(-1, last_real.clamp(min=0))
        before_all = last_real < 0
        first_real = (~padding).long().argmax(-1, keepdim=True)
        ids = torch.where(before_all, documents.gather(-1, first_real), ids)
    starts = ids[:, 1:] != ids[:, :-1]
    return torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.long), starts.long().cumsum(-1)], dim=-1)


def document_ends(runs: Tensor) -> Tensor:
    """First position after the document of each position, int32 `[B, 1, N]`."""
    return torch.searchsorted(runs, runs, right=True, out_int32=True)[:, None]


def check_packing(documents: Tensor | None, padding: Tensor | None, batch: int, like: Tensor) -> None:
    """Raise `ValueError` unless document ids and padding are `[batch, N]`, with the N and device of `like`."""
    expected = (batch, like.shape[-1] if like.ndim else 1)
    for name, x in (("documents", documents), ("padding", padding)):
        if x is not None and x.ndim != 2:
            raise ValueError(f"{name}: expected [B, {expected[1]}], got {list(x.shape)}")
        if x is not None and (x.shape != expected or x.device != like.device):
            raise ValueError(
                f"{name}: expected shape {list(expected)} on {like.device} (batch and length of the mask), "
                f"got {list(x.shape)} on {x.device}"
            )
    if documents is not None and (documents.is_floating_point() or documents.dtype == torch.bool):
        raise ValueError(f"documents: expected integer ids, got {documents.dtype}")
    if padding is not None and padding.dtype != torch.bool:
        raise ValueError(
            f"padding: expected bool with True at padded positions, got {padding.dtype}; "
            "for a 0/1 attention mask, give `attention_mask == 0`"
        )
