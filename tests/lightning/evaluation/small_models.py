"""Models with each attention in which selection has an effect, and models made by hand."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dma_lightning import MIXERS, DogeForCausalLM, ModelConfig
from dma_lightning.data.needles import VAL, NeedleTask

TASK = NeedleTask(60, key_symbols=5, value_symbols=4, filler_symbols=6, key_length=2, value_length=3)
SHAPE = ModelConfig(
    vocab_size=TASK.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, keep_window_size=9, sliding_window=9, kv_lora_rank=12, qk_rope_head_dim=4,
    qk_nope_head_dim=6, v_head_dim=8, backend="torch", nsa_compress_block=8, nsa_compress_stride=4,
    nsa_compress_hidden=16, nsa_select_block=8, nsa_select_count=3, nsa_window=5,
)  # fmt: skip
ATTENTIONS = list(MIXERS)


def make_model(attention: str, dtype: torch.dtype = torch.float64, **changed: object) -> DogeForCausalLM:
    """A model with random weights, so that every weight has an effect."""
    torch.manual_seed(1)
    model = DogeForCausalLM(replace(SHAPE, attention=attention, **changed)).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


class Tokens:
    """A cache that keeps all tokens."""

    def __init__(self, batch: int) -> None:
        self.read = torch.zeros(batch, 0, dtype=torch.int64)

    @property
    def length(self) -> Tensor:
        return torch.full((len(self.read),), self.read.shape[1])

    def select(self, rows: Tensor) -> None:
        self.read = self.read[rows]


class FindsValues:
    """Answers with the value of the key that is asked for, which it finds in the tokens that it has read."""

    def new_cache(self, batch: int, full: bool = False) -> list[Tokens]:
        return [Tokens(batch)]

    def __call__(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        cache: Sequence[Tokens] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        assert cache is not None
        assert last_only
        cache[0].read = torch.cat([cache[0].read, input_ids], dim=1)
        tokens = torch.tensor([self.next_token(row) for row in cache[0].read.tolist()])
        return nn.functional.one_hot(tokens, TASK.vocab_size)[:, None].double()

    def next_token(self, row: list[int]) -> int:
        """The answer after the tokens of a row."""
        last = len(row) - 1 - row[::-1].index(VAL) if VAL in row else None
        if last is None:
            return 0
        asked = row[last - TASK.key_length :]
        places = (i for i in range(last - TASK.key_length) if row[i : i + len(asked)] == asked)
        return next((row[i + len(asked)] for i in places), 0)


class SaysAlways(FindsValues):
    """Answers with the same token, whatever it has read."""

    def __init__(self, token: int) -> None:
        self.token = token

    def next_token(self, row: list[int]) -> int:
        return self.token
