"""Reading sequences with a cache, one chunk at a time.

B batch, N length, n positions of a chunk, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dma_lightning.generation import Decoder, evaluating
from dma_lightning.mixers.base import MixerCache

_SHAPES = 128  # to compile: for each length, the first and later chunks, in full batches and in the last batch


@dataclass(frozen=True)
class Reader:
    """Reads sequences so that memory holds no more than a chunk and the cache at once.

    Use all methods within `inferring`.

    Attributes:
        model: the decoder.
        device: the model's device.
        chunk_size: number of positions to read at once.
        full_cache: keep all keys, for comparison.

    Raises:
        ValueError: if a chunk would be empty.
    """

    model: Decoder
    device: str = "cpu"
    chunk_size: int = 2048
    full_cache: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {self.chunk_size}")

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """A context without gradients, dropout and compiled layers, which would be compiled again for each length.

        FlexAttention is always compiled, and needs more shapes here than torch allows by default.
        """
        with torch.inference_mode(), evaluating(self.model), torch._dynamo.config.patch(recompile_limit=_SHAPES):
            yield

    def prompt(self, input_ids: Tensor) -> tuple[list[MixerCache], Tensor]:
        """The cache after sequences `[B, N]`, and the logits of the next token, `[B, V]`."""
        cache = self.model.new_cache(len(input_ids), self.full_cache)
        for part in input_ids.split(self.chunk_size, dim=1):
            logits = self.model(part, cache=cache, last_only=True)
        return cache, logits[:, -1]

    def step(self, token: Tensor, cache: Sequence[MixerCache]) -> Tensor:
        """Logits after one more token `[B]` of each sequence, `[B, V]`."""
        return self.model(token[:, None], cache=cache, last_only=True)[:, -1]

    def chunks(
        self, input_ids: Tensor, documents: Tensor | None = None, padding: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Positions of each chunk of sequences `[B, N]` in turn, and the chunk's logits `[B, n, V]`."""
        cache = self.model.new_cache(len(input_ids), self.full_cache)
        for start in range(0, input_ids.shape[1], self.chunk_size):
            part = slice(start, start + self.chunk_size)
            own, padded = (None if x is None else x[:, part] for x in (documents, padding))
            yield part, self.model(input_ids[:, part], own, padded, cache=cache)
