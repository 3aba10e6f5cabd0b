"""The causal top-w as one operation, opaque to torch.compile; on CUDA it runs Triton kernels.

B batch, G KV heads, N length, W keep-window size.
"""

import torch
from torch import Tensor

from dma_kernels.launching import register_launch
from dma_kernels.selection.deaths import KeyOrder, top_w_deaths


def _plain_deaths(ranks: Tensor, runs: Tensor | None, padding: Tensor | None, window: int, last: int = 0) -> Tensor:
    length, death = ranks.shape[-1], top_w_deaths(KeyOrder.of_ranks(ranks, runs, padding), window)
    return (death + min(last, length)).clamp(max=length).contiguous()


@torch.library.custom_op("dma_kernels::top_w_deaths", mutates_args=())
def deaths_by_rank(ranks: Tensor, runs: Tensor | None, padding: Tensor | None, window: int, last: int = 0) -> Tensor:
    """`top_w_deaths` of keys ordered by `KeyOrder.of_ranks`; opaque to torch.compile, with Triton kernels on CUDA.

    Args:
        ranks: `[B, G, N]`, int64, or any floating dtype; floating ranks are compared by their `ordered_bits`.
        runs: number of the document of each position, integers `[B, N]`, ascending from 0 or more.
        padding: bool `[B, N]`; keys with True do not compete, and their deaths have no meaning.
        window: W.
        last: each key dies this many positions later than without `last`, but at N at the latest.

    Returns:
        int32 `[B, G, N]`.
    """
    return _plain_deaths(ranks, runs, padding, window, last)


@register_launch(deaths_by_rank, without_triton=_plain_deaths)
def _(ranks: Tensor, runs: Tensor | None, padding: Tensor | None, window: int, last: int = 0) -> Tensor:
    from dma_kernels.selection.kernels import launch_top_w_deaths

    return launch_top_w_deaths(ranks, runs, padding, window=window, last=last)


@deaths_by_rank.register_fake
def _(ranks: Tensor, runs: Tensor | None, padding: Tensor | None, window: int, last: int = 0) -> Tensor:
    return ranks.new_empty(ranks.shape, dtype=torch.int32)
