"""Continuations of the beginnings of sequences, written to a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from dma_lightning.data.base import Batch
from dma_lightning.generation import generate, pad_prompts, prompt_and_rest, split_text
from dma_lightning.model import decoder_of
from dma_lightning.run_folder import run_folder
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import Tokenizer


class ContinuationWriter(BasePredictionWriter):
    """Continues the beginning of every sequence of `predict` and writes the results to a JSONL file.

    A line has `index` (of the sequence), `prompt`, `continuation` and `expected` (what follows in the data): text if
    the data has a tokenizer, else lists of tokens. Continuation and expected text both start right after the prompt; a
    character that the end of the prompt splits appears in both. If documents are separate, prompt and expected text
    are from one document. If there are several processes, each writes its own file.

    Args:
        path: path of the file, which must not exist. Default: `continuations.jsonl` in the run's folder.
        prompt_length: number of tokens of the sequence in the prompt. Default: half of them.
        max_new_tokens: how many tokens to generate. Default: as many as are left in the sequence.
        sampling: how tokens are chosen. Default: the likeliest.
        seed: seed for drawing tokens.

    Raises:
        ValueError: if the file exists, or a prompt is longer than the sequences.
    """

    def __init__(
        self,
        path: str | None = None,
        prompt_length: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(write_interval="batch")
        for name, value in (("prompt_length", prompt_length), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.path, self.prompt_length, self.max_new_tokens = path, prompt_length, max_new_tokens
        self.sampling, self.seed = sampling, seed
        self.file: Path | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_folder(trainer)  # a collective call: every rank takes part
        path = Path(self.path) if self.path else Path(folder) / "continuations.jsonl"
        if trainer.world_size > 1:
            path = path.with_stem(f"{path.stem}-rank{trainer.global_rank}")
        if path.exists():
            raise ValueError(f"{path}: expected no such file, since nothing is overwritten; name another with path")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        rows, length = batch["input_ids"].shape
        prompt_length = self.prompt_length or max(1, length // 2)
        if prompt_length > length:
            raise ValueError(f"prompt_length: expected at most the {length} tokens of a sequence, got {prompt_length}")
        count = self.max_new_tokens or max(1, length - prompt_length)
        parts = [prompt_and_rest(batch, row, prompt_length) for row in range(rows)]
        prompts, rests = ([part.tolist() for part in of_all] for of_all in zip(*parts, strict=True))
        input_ids, padding = pad_prompts(prompts, pl_module.device)
        options = {"padding": padding if padding.any() else None, "seed": self.seed + batch_idx}
        with trainer.precision_plugin.forward_context():
            new = generate(decoder_of(pl_module), input_ids, count, self.sampling, **options).tolist()
        lines = zip(batch_indices or range(rows), prompts, new, (rest[:count] for rest in rests), strict=True)
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it from outside
        tokenizer = getattr(data, "tokenizer", None)
        assert self.file is not None  # `on_predict_start` has named it
        with self.file.open("a") as file:
            for index, *values in lines:
                texts = values if tokenizer is None else _texts(tokenizer, *values)
                line = dict(zip(("prompt", "continuation", "expected"), texts, strict=True))
                file.write(json.dumps({"index": index, **line}, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print(f"continuations: {self.file}")
        trainer.strategy.barrier()  # so that all files exist when the command ends


def _texts(tokenizer: Tokenizer, prompt: list[int], new: list[int], expected: list[int]) -> list[str]:
    """The text of the prompt, and the text that each of the others adds to it."""
    before, made = split_text(tokenizer, prompt, new)
    _, real = split_text(tokenizer, prompt, expected)
    return ["".join(pieces) for pieces in (before, made, real)]
