"""Training steps of whole models with each attention, in one run on one GPU.

A step is forward, loss, backward and fused AdamW on 32,768 random tokens in sequences of one length, in bfloat16 with
float32 master weights. Layers of 80m are compiled. Those of 1.7b are not, and are recomputed in the backward pass,
since their activations would not fit in memory. `mha` and `mla` use cuDNN's attention where they can. Each figure is
the minimum, median and maximum of several steps; memory is the peak of a step.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product, starmap

import torch
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import sdpa_kernel

from dma_lightning import DogeForCausalLM
from dma_lightning.cli.sizes import read_config
from dma_lightning.mixers import MIXERS
from harness import CONFIGS, CommandLine, Part, Result, Row, Table, describe, record, spread
from harness.tables import gpu_of, interval, length_of
from harness.timing import event_ms
from harness.training import COMPILED, LENGTHS, RECOMPUTED, SDPA, TOKENS, VOCABULARY, Case, compile_ahead

STEPS = {COMPILED: 5, RECOMPUTED: 3}


def measure(cases: list[Case]) -> Iterator[Row]:
    """One row for each case."""
    if compiled := [case for case in cases if case.shape == COMPILED]:
        # One layer is enough, since all layers share the compiled code.
        compile_ahead(partial(measure_step, num_hidden_layers=1, vocab_size=256), compiled)
    for case in cases:
        row = case._asdict()
        try:
            row |= measure_step(case)
        except RuntimeError as error:  # out of memory, mostly
            row["error"] = str(error)[:200]
        torch.compiler.reset()
        torch.cuda.empty_cache()
        yield row


def measure_step(case: Case, **changes: int) -> Row:
    """Milliseconds of a step, its FLOPs, and its peak memory in GiB."""
    torch.manual_seed(0)
    shape, length, attention = case
    config = read_config(CONFIGS / "model" / f"{shape}-published.yaml")
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": length} | changes
    config = replace(config, attention=attention, **changes)
    with torch.device("cuda"):
        model = DogeForCausalLM(config)
        tokens = torch.randint(config.vocab_size, (TOKENS // length, length + 1))
    flops = model.flops_per_token * TOKENS
    for i, layer in enumerate(model.layers):
        if shape == COMPILED:
            layer.compile(dynamic=False)
        if shape == RECOMPUTED:
            model.layers[i] = checkpoint_wrapper(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with sdpa_kernel(SDPA, set_priority=True):
        step()
        if shape == COMPILED:
            step()
        torch.cuda.reset_peak_memory_stats()
        times = event_ms(step, STEPS[shape])
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": spread(times), "teraflops": flops / 1e12, "peak_gib": peak}


def tables(result: Result) -> list[Part]:
    """What the pages show: a row for each shape and length, a column for each attention."""
    rows: dict[str, list[str]] = {}
    for row in result["steps"]:
        cell = f"{interval(row['ms'], style=',.0f')}, {row['peak_gib']:.0f} GiB" if "ms" in row else "failed"
        rows.setdefault(f"{row['shape']}, {length_of(row)}", []).append(cell)
    return [
        Table(
            [[case, *own] for case, own in rows.items()],
            "**`python benchmarks/gpu_mixers.py`**: milliseconds of a training step of a whole model on a GPU, and its "
            "peak memory, with each attention; lower is better. A step takes 32,768 random tokens in sequences of N; "
            "bf16-mixed, fused AdamW. Layers of 80m are compiled. Those of 1.7b are not, and are recomputed in the "
            f"backward pass. Median [min - max] of 5 steps of 80m and 3 of 1.7b ({gpu_of(result)}). At 80m, the steps "
            "of `dma` and `swa` wait for the CPU; with CUDA graphs (next section), they do not:",
            ["model, N", *dict.fromkeys(f"`{row['attention']}`" for row in result["steps"])],
        )
    ]


def main() -> None:
    """Measure, print, and write the JSON file."""
    line = CommandLine(__doc__, "gpu_mixers", gpus=1, duration="less than ten minutes for each shape on an H200")
    line.add_argument("--shapes", nargs="+", default=list(STEPS), choices=list(STEPS), help="default: both")
    line.add_lengths(LENGTHS)
    line.add_argument("--attentions", nargs="+", default=list(MIXERS), choices=list(MIXERS), help="default: all")
    args = line.parse_args()
    cases = list(starmap(Case, product(args.shapes, args.lengths, args.attentions)))
    record(args.out, {"environment": describe()}, {"steps": measure(cases)}, tables)


if __name__ == "__main__":
    main()
