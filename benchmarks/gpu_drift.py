"""The cost of the shipped form of dynamic masks on a GPU, compared with the published form.

The shipped form adds a drift, gates and a retention loss. There are two tables, both in bfloat16 with w = 1024.

1. Times of parts, with and without a drift, as CUDA graphs: selecting keys by their ranks, attention over slots that
   are already filled, and a decoding step. Attention has the same mask in both cases, so only the biases and their
   gradients make a difference. Each figure is the median [min - max] of several measurements by Triton's `do_bench`,
   each of which is itself a median.
2. Training steps of 80m through `fit`, as in gpu_fit.py: full attention (`mha`), the published form, and the shipped
   form. The shipped form has three rows: a step with its own window, such a step without the retention loss, and a step
   that keeps all keys, as some steps do under `MixedWindows`. The figures are those that `SpeedMonitor` logs.
"""

import gc
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from dma_kernels import DynamicMaskCache, Lifetimes, NewKeys, SegmentSlots, fused_attention
from dma_kernels.fixed_point import ranks_of_steps
from harness import CommandLine, Part, Result, Row, Table, describe, record
from harness.inputs import make_inputs
from harness.tables import gpu_of, interval, length_of
from harness.timing import captured, time_ms
from harness.training import (
    COMPILED,
    COMPILING,
    FIGURES,
    INTERVAL,
    TOKENS,
    Case,
    LoggedFigures,
    compile_ahead,
    fit,
    write_corpus,
)

WINDOW, LENGTHS = 1024, [4096, 32768]
LAYERS = 16  # layers of a decoding step; each has its own cache, so that its keys are not in the L2 cache
PARTS = ("selection", "selection with keep_last", "forward", "forward and backward", "decoding step")


class Form(NamedTuple):
    """A form of attention to train."""

    attention: str
    published: bool
    options: dict[str, Any]


FORMS = {
    "mha": Form("mha", True, {}),
    "published": Form("dma", True, {}),
    "shipped": Form("dma", False, {}),
    "without retention loss": Form("dma", False, {"retention_weight": 0}),
    "all keys": Form("dma", False, {"keep_window_size": 1 << 20}),
}


class Keys(NamedTuple):
    """Inputs of selection and attention for keys `[1, G, N]`, with or without a drift."""

    content: Tensor
    steps: Tensor | None
    rank: Tensor
    bias: Tensor
    query_bias: Tensor | None

    @classmethod
    def drawn(cls, kv_heads: int, length: int, drifts: bool) -> "Keys":
        content = torch.randn(1, kv_heads, length, device="cuda")
        if not drifts:
            return cls(content, None, content, content.clone().requires_grad_(), None)
        steps = torch.rand_like(content) * 4 / WINDOW
        drift = steps.double().cumsum(-1)
        bias, query_bias = drift.requires_grad_(), (-drift).detach().requires_grad_()
        return cls(content, steps, ranks_of_steps(content, steps), bias, query_bias)


def measure_parts(heads: int, kv_heads: int, length: int) -> Iterator[Row]:
    """Measure each part, without and with a drift."""
    q, k, v, _ = make_inputs(heads, kv_heads, length, projected=True)
    grad = torch.randn_like(q)
    both = {drifts: Keys.drawn(kv_heads, length, drifts) for drifts in (False, True)}
    mask = Lifetimes.top_w(both[True].content, WINDOW, drift=both[True].steps)  # the mask of attention, in both cases
    for drifts, keys in both.items():
        attend = partial(
            fused_attention, q, k, v, keys.bias, mask, slots=SegmentSlots.of(mask, 1, kv_heads),
            query_bias=keys.query_bias,
        )  # fmt: skip
        trained = [q, k, v, keys.bias, *([keys.query_bias] if drifts else [])]
        parts = {
            "selection": partial(Lifetimes.top_w, keys.content, WINDOW, drift=keys.steps),
            "selection with keep_last": partial(
                Lifetimes.top_w, keys.content, WINDOW * 3 // 4, keep_last=WINDOW // 4, drift=keys.steps
            ),
            "forward": attend,
            "forward and backward": partial(train, attend, trained, grad),
        }
        times = {name: time_ms(captured(part)) for name, part in parts.items()}
        times["decoding step"] = [x / LAYERS for x in time_ms(captured(decoding_steps(heads, kv_heads, drifts)))]
        yield {"heads": heads, "kv_heads": kv_heads, "length": length, "window": WINDOW, "drift": drifts, "ms": times}


def train(attend: partial[Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(attend(), inputs, grad)


def decoding_steps(heads: int, kv_heads: int, drifts: bool) -> partial[None]:
    """A decoding step of one position in several layers; in each, the new key pushes another one out."""
    caches = []
    for _ in range(LAYERS):
        caches.append(DynamicMaskCache(1, kv_heads, 128, WINDOW, dtype=torch.bfloat16, device="cuda", backend="triton"))
        caches[-1].attend(*new_keys(heads, kv_heads, 2 * WINDOW, drifts), attention=fused_attention)
    q, new = new_keys(heads, kv_heads, 1, drifts)
    new.rank.fill_(1 << 50 if drifts else 9)  # if the rank equals another one, the new key wins
    return partial(step_all, caches, q, new)


def new_keys(heads: int, kv_heads: int, count: int, drifts: bool) -> tuple[Tensor, NewKeys]:
    """Queries and keys of `count` positions."""
    q, k, v, _ = (x.detach() for x in make_inputs(heads, kv_heads, count))
    keys = Keys.drawn(kv_heads, count, drifts)
    query_bias = None if keys.query_bias is None else keys.query_bias.detach()
    return q, NewKeys(k, v, keys.bias.detach(), keys.rank, query_bias=query_bias)


def step_all(caches: Sequence[DynamicMaskCache], q: Tensor, new: NewKeys) -> None:
    """One step with every cache."""
    for cache in caches:
        cache.attend(q, new)


def fit_form(corpus: Path, watch: pl.Callback, length: int, form: str, steps: int, **options: Any) -> None:
    """Train 80m for `steps` steps."""
    chosen, every = FORMS[form], INTERVAL[COMPILED]
    case = Case(COMPILED, length, chosen.attention, chosen.published)
    trainer = {"max_steps": steps, "log_every_n_steps": min(every, steps - 1)}
    fit(corpus, case, watch, trainer, graphs=True, **chosen.options, **options)


def compile_form(corpus: Path, case: Case) -> None:
    """Compile what a measurement needs. One layer is enough, since all layers share the compiled code.

    The `shape` of the case holds the name of a form.
    """
    fit_form(corpus, pl.Callback(), case.length, case.shape, 4, num_hidden_layers=1)


def measure_training(corpus: Path, lengths: Sequence[int], forms: Sequence[str]) -> Iterator[Row]:
    """One row for each length and form."""
    for length, form in product(lengths, forms):
        watch = LoggedFigures()
        fit_form(corpus, watch, length, form, INTERVAL[COMPILED] * (COMPILING + FIGURES) + 1)
        speeds = watch.spreads()["tokens_per_s"]
        yield {
            "shape": COMPILED, "length": length, "form": form, "tokens_per_s": speeds,
            "step_ms": [1e3 * TOKENS / x for x in reversed(speeds)],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }  # fmt: skip
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tables(result: Result) -> list[Part]:
    """The tables on the pages: the parts, and training steps by form."""
    plain, drifting = result["parts"]
    published = {row["length"]: row for row in result["training"] if row["form"] == "published"}
    return [
        Table(
            PARTS,
            "**`python benchmarks/gpu_drift.py`**: milliseconds of each part, with and without a drift; lower is "
            f"better. Each part is a CUDA graph ({plain['heads']}/{plain['kv_heads']} heads, {length_of(plain)} "
            f"tokens, w = {WINDOW}, bfloat16, batch 1; {gpu_of(result)}). Median [min - max]:",
            ["", "no drift", "drift", "with / without"],
            lambda name: [
                name, interval(plain["ms"][name]), interval(drifting["ms"][name]),
                f"{drifting['ms'][name][1] / plain['ms'][name][1]:.2f}",
            ],
        ),
        Table(
            result["training"],
            "Milliseconds of a training step of 80m with 32,768 tokens through `dma-lightning fit`; lower is better. "
            "`without retention loss` and `all keys` are also steps of the shipped form. Layers are compiled and run "
            "as CUDA graphs; w = 1024. Median [min - max] of 3 intervals of 20 steps:",
            ["form", "N", "step", "compared with published", "peak GiB"],
            lambda row: [
                row["form"], length_of(row), interval(row["step_ms"]),
                f"{row['step_ms'][1] / published[row['length']]['step_ms'][1] - 1:+.1%}", f"{row['peak_gib']:.1f}",
            ],
        ),
    ]  # fmt: skip


def main() -> None:
    """Measure, print, and write the JSON file after each row."""
    line = CommandLine(__doc__, "gpu_drift", gpus=1, duration="about four minutes on an H200")
    line.add_lengths(LENGTHS)
    args = line.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        write_corpus(corpus)
        cases = [Case(form, length, "") for length, form in product(args.lengths, FORMS)]
        compile_ahead(partial(compile_form, corpus), cases)
        rows = {
            "parts": measure_parts(16, 4, 32768),
            "training": measure_training(corpus, args.lengths, list(FORMS)),
        }
        record(args.out, {"environment": describe()}, rows, tables)


if __name__ == "__main__":
    main()
