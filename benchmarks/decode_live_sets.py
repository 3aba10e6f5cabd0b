"""How many queries see different keys when a text is decoded token by token than in one forward pass.

    python benchmarks/decode_live_sets.py CHECKPOINT      of a byte-level model, such as `make train` writes

In the first layer, all keys of the same token have exactly the same rank, and matrix products of different shapes round
differently. Ranks are compared by 16 mantissa bits only, so that rounding does not break such ties. The text is the
beginning of Python's help topics.
"""

from pathlib import Path

import torch
from torch import Tensor

from dma_kernels import Lifetimes
from dma_lightning import DogeForCausalLM, LanguageModel
from dma_lightning.mixers import dynamic_mask
from harness import CommandLine, Part, Result, describe, markdown, write
from harness.tables import cpu_of


@torch.no_grad()
def different_live_sets(model: DogeForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How many queries see different keys, and how many there are, both int64 `[layers]`.

    Tokens are `[B, N]`. The model must select by rank alone.
    """
    ranks: list[Tensor] = []
    attend = dynamic_mask.attend

    def recording(backend: str, *inputs: Tensor, **more: Tensor | None) -> Tensor:
        ranks.append(inputs[4])
        return attend(backend, *inputs, **more)

    dynamic_mask.attend = recording
    try:
        model(tokens)
    finally:
        dynamic_mask.attend = attend
    window, length = model.config.keep_window_size, tokens.shape[1]
    masks = [Lifetimes.top_w(x, window).to_dense() for x in ranks]  # [B, G, N, N]
    different = torch.zeros(len(masks), dtype=torch.long)
    cache = model.new_cache(tokens.shape[0])
    for t in range(length):
        model(tokens[:, t : t + 1], cache=cache, last_only=True)
        for i, (layer, mask) in enumerate(zip(cache, masks, strict=True)):
            seen = torch.zeros_like(mask[:, :, t], dtype=torch.long)
            seen.scatter_add_(2, layer.state.position.clamp(min=0), layer.visible().long())
            different[i] += (seen.bool() != mask[:, :, t]).any(-1).sum()
    return different, torch.tensor([mask[..., 0].numel() for mask in masks])


def text_tokens(length: int) -> Tensor:
    """The first bytes of the default corpus, `[1, N]`."""
    from pydoc_data.topics import topics

    return torch.tensor([list("\n".join(topics.values()).encode()[:length])])


def tables(result: Result) -> list[Part]:
    """What the pages say: how many queries see different keys."""
    return [
        "**`python benchmarks/decode_live_sets.py`**: how many queries see different keys when a text is decoded token "
        f"by token than in one forward pass; 0 is correct. Of {sum(result['queries']):,} queries, "
        f"{sum(result['different'])} do (all layers and KV heads, {result['length']:,} bytes of text, the model of "
        f"`make train`, w = {result['window']}; {cpu_of(result)})."
    ]


def main() -> None:
    """Count, print, and write the JSON file."""
    line = CommandLine(__doc__, "decode_live_sets", duration="about a minute on two cores")
    line.add_argument("checkpoint", type=Path)
    line.add_argument("--length", type=int, default=2000, help="bytes of text (default: 2000)")
    args = line.parse_args()
    changed = {"max_position_embeddings": args.length}
    model = LanguageModel.load_from_checkpoint(args.checkpoint, map_location="cpu", weights_only=True, **changed)
    model, tokens = model.model.eval(), text_tokens(args.length)
    different, queries = different_live_sets(model, tokens)
    result = {"environment": describe(), "length": tokens.shape[1], "window": model.config.keep_window_size}
    result |= {"queries": queries.tolist(), "different": different.tolist()}
    write(args.out, result)
    print(markdown(tables(result)))


if __name__ == "__main__":
    main()
