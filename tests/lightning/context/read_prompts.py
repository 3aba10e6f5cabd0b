"""One of four processes that read prompts together, also in pairs; started by `test_reading_together.py`.

    python read_prompts.py FOLDER

Logits and tokens are written to the folder, and compared there with those of one process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from chosen_form import CHOSEN
from torch import Tensor

from dma_kernels.context import ContextGroup
from dma_lightning import DogeForCausalLM, ModelConfig
from dma_lightning.reading_together import read_together

PROCESSES, STEPS, LENGTH, VOCABULARY = 4, 20, 43, 24
FORMS: dict[str, dict] = {
    "published": {},
    "chosen": CHOSEN,
    "kept": {"keep_last": 3, "sinks": 2, "keep_window_size": 3},
    "striped": {"drift": "gate", "memory_heads": 1, "memory_stripes": 3, "content_in_bias": False},
    "swa": {"attention": "swa", "sliding_window": 7},
    "swa-drift": {"attention": "swa", "sliding_window": 30, "drift": "gate"},
}


def model_of(**options: object) -> DogeForCausalLM:
    """A small model in float64 with random selection parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 80}
    model = DogeForCausalLM(ModelConfig(**{"keep_window_size": 5, **sizes, **heads, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts, two of them padded on the left: one over more than a whole part."""
    torch.manual_seed(1)
    padding = torch.arange(LENGTH) < torch.tensor([0, 4, 25])[:, None]
    return torch.randint(VOCABULARY, (3, LENGTH)), padding


@torch.no_grad()
def continued(form: str, padded: bool, context: ContextGroup | None = None) -> Tensor | None:
    """Logits after the prompts and after each of the next steps, `[B, STEPS + 1, V]`; None before the last process."""
    model, (input_ids, padding) = model_of(**FORMS[form]), prompts()
    cache, mask = model.new_cache(len(input_ids)), padding if padded else None
    if context is None:
        logits = [model(input_ids, padding=mask, cache=cache, last_only=True)[:, -1]]
    else:
        logits = [read_together(model, input_ids, mask, cache, context)]
        if context.rank + 1 < context.size:
            return None
    for _ in range(STEPS):
        logits.append(model(logits[-1].argmax(-1)[:, None], cache=cache)[:, -1])
    return torch.stack(logits, dim=1)


def main(folder: Path) -> None:
    """Logits and tokens of all forms, by four processes and by each pair."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    found = {}
    for parts, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
        context = ContextGroup.of(group)
        for form in FORMS:
            for padded in (False, True):
                found[form, parts, padded] = continued(form, padded, context)
        input_ids, padding = prompts()
        found["tokens", parts] = model_of().generate(input_ids, 9, padding=padding, context=context)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
