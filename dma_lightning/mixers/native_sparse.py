"""Native sparse attention: compressed blocks, selected blocks and a window, mixed by gates.

B batch, N length, C hidden size, H query heads, G KV heads, D head dim, Nc compressed blocks.
"""

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dma_kernels import Packing
from dma_kernels.selected_blocks.attention import block_attention, block_attention_reference, kernels_take
from dma_kernels.selected_blocks.choice import kernel_takes
from dma_lightning.backends import Backend, check_backend, explain_backend, resolve_backend
from dma_lightning.mixers.base import (
    GroupedQueryMixer,
    MixerConfig,
    check_mixer_input,
    mean_keys,
    merge_heads,
    positions_of,
)
from dma_lightning.mixers.native_sparse_blocks import BlockGrid
from dma_lightning.mixers.position_cache import Places, PositionCache
from dma_lightning.mixers.sdpa import attend_places, masked_attention
from dma_lightning.mixers.softmax import window_attention

_GATHERED = 1 << 25  # limit for elements of gathered keys in memory at once
_WEIGHED = 1 << 26  # limit for weights of compressed blocks in memory at once


@dataclass(frozen=True, kw_only=True)
class NativeSparseConfig(MixerConfig):
    """The settings that native sparse attention reads."""

    nsa_compress_block: int = 16
    """nsa: tokens of a compressed block."""
    nsa_compress_stride: int = 8
    """nsa: tokens from one compressed block to the next; the sizes of both kinds of blocks must be multiples of it."""
    nsa_compress_hidden: int = 32
    """nsa: hidden width of the network that compresses a block."""
    nsa_select_block: int = 16
    """nsa: tokens of a block that is selected as a whole."""
    nsa_select_count: int = 4
    """nsa: number of selected blocks per query: the first one, its own, the one before its own, and the best others."""
    nsa_window: int = 32
    """nsa: number of last positions that a query also attends to, its own included."""
    nsa_separate_kv: bool = True
    """nsa: whether each of the three branches has separate keys and values."""


class NativeSparseAttention(GroupedQueryMixer["NativeSparseCache"]):
    """Causal self-attention with three branches, each weighted by a sigmoid gate per query head.

    - The compressed branch attends to blocks. A network makes one key and one value of each block.
    - The selected branch attends to the tokens of `nsa_select_count` blocks per query. The first block, the query's own
      block and the block before it are always among them. The others are the blocks with the most weight in the
      compressed branch, summed over the heads of a group. The choice itself has no gradient.
    - The third branch attends to the last `nsa_window` positions.

    Blocks lie on one grid over the whole row, even if it holds several documents. A query sees a compressed block only
    if the block lies within one document. The first block of a document is the block in which the document begins. So
    a document that does not begin at a multiple of the block sizes gives slightly different results than it would
    alone.

    Args:
        nsa_compress_block: l, tokens of a compressed block.
        nsa_compress_stride: s, tokens from one compressed block to the next; it divides l and the selection block.
        nsa_compress_hidden: hidden width of the network that compresses.
        nsa_select_block: tokens of a selection block.
        nsa_select_count: number of selected blocks per query.
        nsa_window: positions of the window, the query's own included.
        nsa_separate_kv: whether each branch has separate keys and values, as in the paper, or all share them.
        initializer_range: initial standard deviation of the learned vectors, one for each place in a compressed block,
            that are added to the tokens there.
        backend: backend of the window and the selected branch. The selected branch has Triton kernels. `auto` uses them
            where it chooses `triton` and they support the blocks. Otherwise, plain PyTorch gathers the keys of a few
            queries at a time. If you name `triton`, a Triton kernel also chooses the blocks, provided that it takes
            their number and sizes (`kernel_takes`). If it does not, plain PyTorch chooses them, and `computed_by` says
            so.
        shape: the arguments of `GroupedQueryMixer`.

    Raises:
        ValueError: if the sizes do not match, or for an unknown backend.

    Source: arXiv 2502.11089, section 3. We chose what it leaves open: compressed keys are made from keys before the
        rotary embedding, and rotated by the position of their first token; of equal blocks, the later one is chosen.
    """

    per_head_parameters = ("gate_proj.weight",)

    def __init__(
        self,
        *,
        nsa_compress_block: int = 32,
        nsa_compress_stride: int = 16,
        nsa_compress_hidden: int = 192,
        nsa_select_block: int = 64,
        nsa_select_count: int = 16,
        nsa_window: int = 512,
        nsa_separate_kv: bool = True,
        initializer_range: float = 0.02,
        backend: Backend = "auto",
        **shape: Any,
    ) -> None:
        super().__init__(**shape)
        check_backend(backend)
        if nsa_window < 1 or nsa_compress_hidden < 1:
            raise ValueError(
                f"expected nsa_window and nsa_compress_hidden >= 1, got {nsa_window} and {nsa_compress_hidden}"
            )
        self.grid = BlockGrid(nsa_compress_block, nsa_compress_stride, nsa_select_block, nsa_select_count)
        self.window, self.backend = nsa_window, backend
        kv_bias = self.k_proj.bias is not None
        kinds = ("compress", "window") if nsa_separate_kv else ()
        self.extra_k_proj, self.extra_v_proj, self.extra_k_norm = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for kind in kinds:
            for projections in (self.extra_k_proj, self.extra_v_proj):
                projections[kind] = nn.Linear(self.hidden_size, self.num_kv_heads * self.head_dim, bias=kv_bias)
            if self.k_norm is not None:
                self.extra_k_norm[kind] = nn.RMSNorm(self.head_dim, eps=self.k_norm.eps)
        sizes = (self.grid, self.head_dim, nsa_compress_hidden, initializer_range)
        self.compress_k, self.compress_v = BlockCompression(*sizes), BlockCompression(*sizes)
        self.gate_proj = nn.Linear(self.hidden_size, 3 * self.num_heads, bias=False)

    @classmethod
    def from_config(cls, config: NativeSparseConfig) -> Self:
        sizes = {name: x for name, x in vars(config).items() if name.startswith("nsa_")}
        shape, std = cls.shape_of(config), config.initializer_range
        return cls(**shape, **sizes, initializer_range=std, backend=config.backend)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: "NativeSparseCache | None" = None,
    ) -> Tensor:
        check_mixer_input(x, self.q_proj.weight)
        positions = positions_of(x, cache)
        q = self.rotated(self.heads(x, self.q_proj, self.q_norm), positions)  # [B, H, N, D]
        plain, values = self._keys(x), self._values(x)
        keys = {kind: self.rotated(k, positions) for kind, k in plain.items() if kind != "compress"}
        if cache is None:
            k, v, compressed = (
                keys["select"],
                values["select"],
                self.compressed(plain["compress"], values["compress"], 0),
            )
            places = queries = PositionCache(x.shape[0], device=x.device).place(x.shape[1], packing)
        else:
            kept, places, queries = cache.tokens.extend(packing, key=keys["select"], value=values["select"])
            k, v = kept["key"], kept["value"]
            compressed = cache.extend_compressed(self, plain["compress"], values["compress"])
        fresh = cache is None or cache.tokens.count == x.shape[1]  # from the beginning
        by_kernels = fresh and self._by_kernels(q.device, q.dtype)
        out_compressed, out_selected = self._blocks(q, compressed, k, v, queries, places, by_kernels)

        k, v, places = keys["window"], values["window"], queries
        if cache is not None:
            kept, places, _ = cache.window.extend(packing, key=k, value=v)
        if fresh:
            out_window = window_attention(q, k, v, self.window, self.backend, packing)
        else:
            out_window = attend_places(q, kept["key"], kept["value"], queries, places, self.window)
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (3, -1)).transpose(1, 3)[..., None]  # [B, H, 3, N, 1]
        branches = torch.stack([out_compressed, out_selected, out_window], dim=2)  # [B, H, 3, N, D]
        return self.o_proj(merge_heads((gates * branches).sum(2)))

    def new_cache(self, batch: int, full: bool = False) -> "NativeSparseCache":
        return NativeSparseCache(batch, None if full else self.window, self.grid, self.q_proj.weight.device)

    def mixing_flops(self, length: int) -> float:
        """FLOPs, corrected for the compressing network, whose weights are used per block and not per token."""
        grid, position = self.grid, torch.arange(length)
        blocks = ((position + 1 - grid.compress_block).div(grid.compress_stride, rounding_mode="floor") + 1).clamp(0)
        own = position // grid.select_block
        selected = own.clamp(max=grid.select_count - 1) * grid.select_block + position - own * grid.select_block + 1
        keys = blocks.double().mean().item() + selected.double().mean().item() + mean_keys(length, self.window)
        network = sum(p.numel() for module in (self.compress_k, self.compress_v) for p in module.network.parameters())
        per_token = self.num_kv_heads * grid.compressed(length) / length
        return 4 * self.num_heads * self.head_dim * keys + 2 * network * (per_token - 1)

    def computed_by(self, device: torch.device, dtype: torch.dtype) -> str:
        window = explain_backend(self.backend, device.type, device.index, dtype, self.head_dim)
        if not self._by_kernels(device, dtype):
            return f"{window}; selected blocks by plain PyTorch"
        choice = "" if self._chooses_at_once() else ", chosen in plain PyTorch"
        return f"{window}; selected blocks by Triton kernels{choice}"

    def cache_elements(self, length: int) -> int:
        blocks = self.grid.compressed(length)
        waiting = length - blocks * self.grid.compress_stride  # tokens whose block is not whole yet
        return 2 * self.num_kv_heads * self.head_dim * (length + blocks + waiting + min(length, self.window))

    def compressed(self, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks `[B, G, Nc, D]`, starting with number `first`; `k` is before rotation."""
        k, v = self.compress_k(k), self.compress_v(v)
        position = (first + torch.arange(k.shape[2], device=k.device)) * self.grid.compress_stride
        return self.rotated(k, position[None]), v

    def _keys(self, x: Tensor) -> dict[str, Tensor]:
        """Keys of each branch before the rotary embedding, `[B, G, N, D]`."""
        k = self.heads(x, self.k_proj, self.k_norm)
        norms = cast("dict[str, nn.RMSNorm]", dict(self.extra_k_norm.items()))  # empty without QK-norm
        extra = {kind: self.heads(x, proj, norms.get(kind)) for kind, proj in self.extra_k_proj.items()}
        return dict.fromkeys(("compress", "select", "window"), k) | extra

    def _values(self, x: Tensor) -> dict[str, Tensor]:
        """Values of each branch, `[B, G, N, D]`."""
        extra = {kind: self.heads(x, proj) for kind, proj in self.extra_v_proj.items()}
        return dict.fromkeys(("compress", "select", "window"), self.heads(x, self.v_proj)) | extra

    def _by_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether Triton kernels compute the selected branch; with `triton` by name always, even if they will raise."""
        chosen = resolve_backend(self.backend, device.type, device.index, dtype, self.head_dim)
        if self.backend == "auto" and chosen == "triton":
            return kernels_take(self.grid.select_block, self.head_dim, dtype)
        return chosen == "triton"

    def _chooses_at_once(self) -> bool:
        """Whether a kernel chooses the blocks: so far not with `auto`, since its tests have not run on a GPU yet."""
        return self.backend == "triton" and kernel_takes(self.grid, self.num_heads // self.num_kv_heads)

    def _blocks(
        self,
        q: Tensor,
        compressed: tuple[Tensor, Tensor],
        k: Tensor,
        v: Tensor,
        queries: Places,
        keys: Places,
        by_kernels: bool,
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the compressed and the selected branch, `[B, H, n, D]`, computed for some queries at a time."""
        grid, length, first = self.grid, q.shape[2], queries.first_of(keys)
        gathered = max(1, k.shape[0]) * self.num_kv_heads * grid.select_count * grid.select_block * self.head_dim
        weighed = max(1, q.shape[0] * q.shape[1] * grid.compressed(k.shape[2]))
        rows = max(16, _WEIGHED // weighed)
        if not by_kernels:
            rows = max(16, min(rows, 1024, _GATHERED // gathered))
        (compressed_k, compressed_v), seen, selected, chosen = compressed, [], [], []
        at_once = by_kernels and self._chooses_at_once()
        for start in range(0, length, rows):
            here = slice(start, start + rows)
            part, places = q[:, :, here], queries.rows(start, start + rows)
            visible = grid.sees_compressed(places, keys)
            none = not visible.shape[-1]
            seen.append(part * 0 if none else masked_attention(part, compressed_k, compressed_v, visible))
            if not at_once:
                chosen.append(grid.choose(part.detach(), compressed_k.detach(), first[:, here], places, keys))
            if by_kernels:
                continue
            arguments = (part, k, v, chosen[-1], places.position, first[:, here], keys.padding, grid.select_block)
            if length > rows and torch.is_grad_enabled():  # the backward gathers the keys again, to save memory
                selected.append(checkpoint(block_attention_reference, *arguments, use_reentrant=False))
            else:
                selected.append(block_attention_reference(*arguments))
        if at_once:
            chosen = [grid.choose_at_once(q.detach(), compressed_k.detach(), first, keys)]
        if by_kernels:
            selected = [block_attention(q, k, v, torch.cat(chosen, dim=2), first, keys.padding, grid.select_block)]
        return torch.cat(seen, dim=2), torch.cat(selected, dim=2)


class BlockCompression(nn.Module):
    """One vector for each block of tokens of a KV head, by a network over the tokens and their places in the block.

    Args:
        grid: sizes of blocks.
        head_dim: D.
        hidden: width of the network's hidden layer.
        std: standard deviation of the vectors for the places at initialization.
    """

    def __init__(self, grid: BlockGrid, head_dim: int, hidden: int, std: float) -> None:
        super().__init__()
        self.grid = grid
        self.places = nn.Parameter(torch.randn(grid.compress_block, head_dim) * std)
        self.network = nn.Sequential(
            nn.Linear(grid.compress_block * head_dim, hidden, bias=False),
            nn.SiLU(),
            nn.Linear(hidden, head_dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, G, N, D]` to `[B, G, Nc, D]`, where Nc is the number of whole blocks."""
        if x.shape[2] < self.grid.compress_block:
            return x[:, :, :0]
        blocks = x.unfold(2, self.grid.compress_block, self.grid.compress_stride)  # [B, G, Nc, D, l]
        return self.network((blocks.transpose(-1, -2) + self.places).flatten(3))


class NativeSparseCache:
    """Keys and values of all tokens, of all whole blocks, of tokens whose block is not whole yet, and of the window.

    Args:
        batch: B.
        window: number of positions to keep for the window; all if None.
        grid: sizes of blocks.
        device: where the cache is.
    """

    def __init__(self, batch: int, window: int | None, grid: BlockGrid, device: torch.device) -> None:
        self.tokens, self.window = PositionCache(batch, device=device), PositionCache(batch, window, device)
        self.grid = grid
        self._waiting: tuple[Tensor, Tensor] | None = None  # starting with the first token of the next block
        self._compressed: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> Tensor:
        """Positions read so far, int64 `[B]`."""
        return self.tokens.length

    @torch.no_grad()
    def extend_compressed(self, mixer: NativeSparseAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens `[B, G, n, D]`, before the rotary embedding; returns keys and values of all whole blocks."""
        if self._waiting is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self._waiting, (k, v), strict=True))
        new = mixer.compressed(k, v, 0 if self._compressed is None else self._compressed[0].shape[2])
        start = new[0].shape[2] * self.grid.compress_stride
        self._waiting = k[:, :, start:].clone(), v[:, :, start:].clone()
        if self._compressed is None:
            self._compressed = new
        elif start:
            (old_k, old_v), (new_k, new_v) = self._compressed, new
            self._compressed = torch.cat([old_k, new_k], dim=2), torch.cat([old_v, new_v], dim=2)
        return self._compressed

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, int64 `[B']`, in this order; a row may occur several times."""
        self.tokens.select(rows)
        self.window.select(rows)
        for name in ("_waiting", "_compressed"):
            pair = getattr(self, name)
            setattr(self, name, None if pair is None else tuple(x.index_select(0, rows) for x in pair))
