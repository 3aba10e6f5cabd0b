"""The processes that hold the parts of the same sequences.

B batch, N length, P processes, n length of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.context.collectives import gather_parts, register_group
from dma_kernels.packing import Packing, document_runs


@dataclass(frozen=True)
class PartPacking(Packing):
    """Documents and padding of a part, numbered along the whole rows; made by `ContextGroup.pack`.

    Attributes:
        runs: as in `Packing`, but counted from the first document of the row, whichever part it is in.
    """


@dataclass(frozen=True)
class ContextGroup:
    """Processes that hold the same sequences together; process p of P has n positions, from position p n on.

    Args:
        name: name of a registered group; see `of`.
        rank: p, the number of this process.
        size: P.
    """

    name: str
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "ContextGroup":
        """The group of these processes of torch.distributed. Parts are in the order of the ranks in the group.

        Raises:
            ValueError: if this process does not belong to the group.
        """
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                f"group: expected one that this process belongs to, got one of {dist.get_process_group_ranks(group)} "
                f"in process {dist.get_rank()}"
            )
        return cls(register_group(group), rank, dist.get_world_size(group))

    def part_length(self, length: int) -> int:
        """n, the length of a part of a sequence of N positions: N / P, rounded up."""
        return -(-length // self.size)

    def part(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """Cut this process's part out of a tensor with whole sequences.

        Parts have equal lengths. If N is not a multiple of P, positions after the end fill up the last parts. Fill
        `padding` with True, and labels with the number that the loss ignores.

        Args:
            x: a tensor with N positions in dimension `dim`.
            dim: the dimension of positions.
            fill: value at positions after the end.

        Returns:
            A tensor with n positions in dimension `dim`.
        """
        dim, length = dim % x.ndim, x.shape[dim]
        n = self.part_length(length)
        start, stop = min(self.rank * n, length), min((self.rank + 1) * n, length)
        missing = n - (stop - start)
        part = x.narrow(dim, start, stop - start)
        return F.pad(part, [0, 0] * (x.ndim - 1 - dim) + [0, missing], value=fill) if missing else part.contiguous()

    def padding(self, length: int, device: torch.device | str | None = None) -> Tensor | None:
        """Which positions of this part lie after the end of sequences of N positions, bool `[1, n]`.

        If N is a multiple of P, it is None in all processes.
        """
        if length % self.size == 0:
            return None
        return self.part(torch.zeros(1, length, dtype=torch.bool, device=device), fill=True)

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """Positions of this part in the whole sequence, int64 `[1, n]`, for parts of `length` n."""
        return torch.arange(self.rank * length, (self.rank + 1) * length, device=device)[None]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of all processes, `[P, ...]` each; differentiable, see `gather_parts`."""
        return [part[None] for part in parts] if self.size == 1 else gather_parts(parts, self.name, self.size)

    def pack(self, documents: Tensor | None = None, padding: Tensor | None = None) -> PartPacking | None:
        """The packing of a part, in which documents may continue from earlier parts; None without either.

        All processes call it, or none. It sends four numbers per sequence.

        Args:
            documents: integer ids of the part `[B, n]`, as in `Packing.of`. A document that crosses parts has its id in
                all of them.
            padding: bool `[B, n]`, True at padded positions.

        Raises:
            ValueError: on a wrong shape, dtype or device.
        """
        packing = Packing.of(documents, padding)
        if packing is None:
            return None
        if packing.documents is None:
            return PartPacking(None, packing.padding)
        return PartPacking(packing.documents, packing.padding, self._whole_runs(packing.documents, packing.padding))

    def _whole_runs(self, documents: Tensor, padding: Tensor | None) -> Tensor:
        """Numbers of the documents along the whole rows, int64 `[B, n]`."""
        runs, ids = document_runs(documents, padding), documents.long()
        real = torch.ones_like(ids, dtype=torch.bool) if padding is None else ~padding
        seen = real.long().cumsum(-1)  # [B, n]
        first, last = real.long().argmax(-1, keepdim=True), seen.argmax(-1, keepdim=True)
        border = torch.cat([seen[:, -1:].clamp(max=1), ids.gather(-1, first), ids.gather(-1, last), runs[:, -1:]], -1)
        (borders,) = self.gather([border])  # [P, B, 4]
        return _continued(runs, seen > 0, borders[: self.rank + 1])


def _continued(runs: Tensor, begun: Tensor, borders: Tensor) -> Tensor:
    """Runs `[B, n]` of a part, numbered along the whole rows.

    Args:
        runs: runs of the part, counted from 0.
        begun: bool `[B, n]`, False before the part's first real position; there, the document before continues.
        borders: four numbers of each part up to this one, `[p + 1, B, 4]`: whether any position is real, the ids of the
            first and the last real position, and the last run.
    """
    last_run = first_run = end = torch.zeros_like(runs[:, :1])  # [B, 1]
    any_before, id_before = torch.zeros_like(last_run, dtype=torch.bool), last_run
    for border in borders:
        has_real, first, last, count = border.split(1, dim=-1)
        real, last_run = has_real > 0, end
        first_run = last_run + (real & any_before & (first != id_before)).long()
        end, id_before, any_before = first_run + count, torch.where(real, last, id_before), any_before | real
    return torch.where(begun, runs + first_run, last_run)
