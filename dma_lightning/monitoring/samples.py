"""Masks over real text, the keys that are kept longest, and continuations that the model writes.

G KV heads, N length.
"""

import html
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dma_kernels import Lifetimes
from dma_lightning.data.base import Batch
from dma_lightning.generation import generate, prompt_and_rest, split_text
from dma_lightning.model import decoder_of
from dma_lightning.monitoring.recording import RecordedMask, dynamic_layers, first_sequence, record_masks
from dma_lightning.monitoring.writer import ShowingMonitor, Writer, can_show, writers
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import Tokenizer
from dma_lightning.trainer_state import is_last_step, logged_step

_LIVE, _DEAD, _UNSEEN = (0.13, 0.40, 0.67), (0.87, 0.89, 0.92), (1.0, 1.0, 1.0)  # colors of pairs (query, key)
_GAP = 8  # pixels between heads
_LEAST_PIXELS = 256  # minimum side of a mask in a picture


class SampleMonitor(ShowingMonitor):
    """Shows, after validations, masks over the first validation sequence, its best-kept tokens, and a continuation.

    Only dynamic mask attention has masks and kept tokens. Every attention writes a continuation of the first half of
    the sequence; if documents are separate, the prompt is only the end of that half, from the start of its last
    document on. The last validation of a run with `max_steps` always shows everything.

    Args:
        every_n_validations: show them at every n-th validation.
        layers: how many layers to show, spread evenly from the first to the last.
        heads: how many KV heads of a layer to show.
        picture_length: how many positions a picture of a mask shows.
        kept_share: share of the tokens that are marked as kept best.
        max_new_tokens: length of the continuation; 0 leaves it out.
        sampling: how its tokens are chosen. Default: drawn at temperature 0.8.
        seed: seed for drawing tokens.

    Raises:
        ValueError: if a number is out of range.
    """

    shows = "pictures and texts"

    def __init__(
        self,
        every_n_validations: int = 2,
        layers: int = 3,
        heads: int = 4,
        picture_length: int = 256,
        kept_share: float = 0.15,
        max_new_tokens: int = 40,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        least = {"every_n_validations": every_n_validations, "layers": layers, "heads": heads}
        for name, value in (least | {"picture_length": picture_length}).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if max_new_tokens < 0 or not 0 < kept_share < 1:
            raise ValueError(
                f"expected max_new_tokens >= 0 and a kept_share between 0 and 1, got {max_new_tokens} and {kept_share}"
            )
        self.every_n_validations, self.layers, self.heads = every_n_validations, layers, heads
        self.picture_length, self.kept_share = picture_length, kept_share
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.sampling = sampling or Sampling(temperature=0.8)
        self.validations = 0
        self.sequence: Batch | None = None

    def state_dict(self) -> dict[str, int]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validations = state_dict["validations"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise `ValueError` if the model cannot continue a text."""
        layers = dynamic_layers(decoder_of(pl_module)).values()
        if stage == "fit" and self.max_new_tokens and any(mixer.near_distance is not None for mixer in layers):
            raise ValueError(
                "sample_monitor: expected max_new_tokens 0 with content_in_bias far, which cannot generate, got "
                f"{self.max_new_tokens}; set --sample_monitor.max_new_tokens 0, or --sample_monitor null"
            )

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0:
            self.sequence = first_sequence(batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sequence, self.sequence = self.sequence, None
        if sequence is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validations += 1
        due = (self.validations - 1) % self.every_n_validations == 0 or is_last_step(trainer)
        if not due or not can_show(trainer):
            return
        shown_by, step = writers(trainer), logged_step(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it from outside
        tokenizer, model = getattr(data, "tokenizer", None), decoder_of(pl_module)
        if dynamic_layers(model):
            self._show_masks(shown_by, step, record_masks(trainer, model, sequence), sequence, tokenizer)
        if self.max_new_tokens:
            with trainer.precision_plugin.forward_context():
                self._show_continuation(shown_by, step, pl_module, sequence, tokenizer)

    def _show_masks(
        self,
        shown_by: Sequence[Writer],
        step: int,
        recorded: dict[int, RecordedMask],
        sequence: Batch,
        tokenizer: Tokenizer | None,
    ) -> None:
        if not shown_by:
            return
        pieces = text_pieces(tokenizer, sequence["input_ids"][0].tolist())
        for i in spread(list(recorded), self.layers):
            mask = recorded[i]
            picture = mask_picture(mask, self.heads, self.picture_length)
            marked = best_kept(mask.kept_shares(), mask.capacity, self.kept_share)
            for writer in shown_by:
                writer.add_image(f"masks/layer_{i}", picture, step)
                writer.add_text(f"kept/layer_{i}", marked_text(pieces, marked.tolist()), step)

    def _show_continuation(
        self,
        shown_by: Sequence[Writer],
        step: int,
        pl_module: pl.LightningModule,
        sequence: Batch,
        tokenizer: Tokenizer | None,
    ) -> None:
        prompt, rest = prompt_and_rest(sequence, row=0)
        # In one chunk: processes that share a model must call it equally often, however long their prompts are.
        options = {"seed": self.seed, "chunk_size": sequence["input_ids"].shape[1]}
        new = generate(decoder_of(pl_module), prompt[None], self.max_new_tokens, self.sampling, **options)[0]
        if shown_by:
            before, made = _pieces_of_both(tokenizer, prompt.tolist(), new.tolist())
            _, real = _pieces_of_both(tokenizer, prompt.tolist(), rest[: self.max_new_tokens].tolist())
            text = marked_text(before + made, [False] * len(before) + [True] * len(made))
            for writer in shown_by:
                writer.add_text("sample/continuation", f"{text}\n\nThe data continues:\n\n{marked_text(real)}", step)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, with the first and the last among them."""
    if count >= len(items):
        return list(items)
    places = torch.linspace(0, len(items) - 1, count).round().long().tolist()
    return [items[place] for place in places]


def text_pieces(tokenizer: Tokenizer | None, tokens: list[int]) -> list[str]:
    """The text of every token, or its number if there is no tokenizer."""
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    *pieces, rest = tokenizer.decode_stream(tokens)
    return [*pieces[:-1], pieces[-1] + rest] if pieces else []


def _pieces_of_both(tokenizer: Tokenizer | None, prompt: list[int], more: list[int]) -> tuple[list[str], list[str]]:
    if tokenizer is None:
        return text_pieces(None, prompt), text_pieces(None, more)
    return split_text(tokenizer, prompt, more)


def marked_text(pieces: Sequence[str], marked: Sequence[bool] | None = None) -> str:
    """HTML that TensorBoard lets through (other loggers show it too), with the marked pieces in bold."""
    parts, bold = [], False
    for piece, mark in zip(pieces, marked or [False] * len(pieces), strict=True):
        if mark != bold:
            parts.append("<strong>" if mark else "</strong>")
            bold = mark
        parts.append(html.escape(piece, quote=False))
    text = "".join(parts) + ("</strong>" if bold else "")
    return "<pre>" + text.replace("\n", "&#10;") + "</pre>"  # Markdown would end the block at an empty line


def best_kept(kept: Tensor, capacity: int, share: float) -> Tensor:
    """Which keys are kept best, bool `[N]`: the best `share` of those that could have been dropped.

    The last `capacity` keys are left out: all later queries might see them, simply because those are few.

    Args:
        kept: share of the later queries that see each key, `[N]`.
        capacity: how many keys a query keeps.
        share: share of the remaining keys to mark.
    """
    candidates = kept[: max(0, len(kept) - capacity)]
    marked = torch.zeros(len(kept), dtype=torch.bool)
    marked[candidates.cpu().topk(int(len(candidates) * share)).indices] = True
    return marked


def mask_picture(mask: RecordedMask, heads: int, length: int) -> Tensor:
    """The masks of the first heads over the first positions side by side, RGB `[3, height, width]` from 0 to 1.

    Queries run down, keys to the right. A pair is blue if the key is visible, gray if it could be, and white if it is
    in the future, in padding or in another document.
    """
    visible = _corner(mask.lifetimes, length)[:heads]  # [heads, L, L]
    possible = _corner(mask.causal, length)  # [1, L, L]
    colors = torch.tensor([_UNSEEN, _DEAD, _LIVE])
    picture = colors[visible.long() + possible.long()].permute(3, 0, 1, 2)  # [3, heads, L, L]
    pixels = -(-_LEAST_PIXELS // picture.shape[-1])
    picture = picture.repeat_interleave(pixels, 2).repeat_interleave(pixels, 3)
    picture = torch.nn.functional.pad(picture, (0, _GAP), value=1.0)
    return picture.permute(0, 2, 1, 3).flatten(2)[..., :-_GAP]


def _corner(lifetimes: Lifetimes, length: int) -> Tensor:
    """The dense mask `[G, L, L]` of the first L positions, for a batch of one."""
    birth, death = (x[..., :length].cpu() for x in (lifetimes.birth, lifetimes.death))
    return Lifetimes(birth, death, lifetimes.capacity).to_dense()[0]
