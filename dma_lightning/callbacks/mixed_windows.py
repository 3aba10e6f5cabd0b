"""Training steps in which dynamic masks keep every key, mixed with steps that use the model's own window."""

import hashlib
from typing import Any

import lightning.pytorch as pl

from dma_kernels import KeepRule
from dma_kernels.keep_rule import HasKeepRule
from dma_lightning.mixers import DynamicMaskAttention
from dma_lightning.model import decoder_of
from dma_lightning.schedules import total_steps
from dma_lightning.trainer_state import is_logging_step


class MixedWindows(pl.Callback):
    """Lets all layers with dynamic masks keep every key in some optimizer steps, so that far keys are trained too.

    With a window alone, a key gets no gradient from queries that do not see it. The first steps keep all keys and the
    last steps follow the model's own rule; in between, a share of the steps keeps all keys. The seed and the step's
    number decide which, so resumed runs and all processes agree, and nothing is saved. All batches of a step are of one
    kind.

    The model gets its own rule back after the backward pass of each batch, so validation, samples, monitors and
    checkpoints see no other. FLOP figures also assume the model's own rule. Logs `dma/keeps_all`.

    "All steps" means trainer.max_steps, or if that is not set, the steps in trainer.max_epochs. `fit` has this callback
    by default if the model has a retention loss.

    Args:
        share: probability that a step between the first and the last steps keeps all keys.
        first: share of all steps, at the start, in which every step keeps all keys.
        last: share of all steps, at the end, in which every step follows the model's own rule.
        seed: seed for choosing the steps in between.

    Raises:
        ValueError: if a share is not within 0 and 1, or first and last add up to more than 1; at the start of a run, if
            first or last is set but nothing determines the number of steps, or no layer has dynamic masks.
    """

    def __init__(self, share: float = 0.125, first: float = 0.2, last: float = 0.2, seed: int = 0) -> None:
        if not all(0 <= x <= 1 for x in (share, first, last)) or first + last > 1:
            raise ValueError(
                "MixedWindows: expected share, first and last within 0 and 1, and first + last at most 1, got "
                f"{share}, {first} and {last}; change these"
            )
        self.share, self.first, self.last, self.seed = share, first, last, seed
        self._own: list[tuple[HasKeepRule, KeepRule]] = []  # mixers that now keep all keys, with their own rules
        self._steps = 0  # all steps of the run, if first or last is set

    def keeps_all(self, step: int, max_steps: int) -> bool:
        """Whether an optimizer step, counted from 0, keeps every key."""
        if self.last and step >= max_steps - round(max_steps * self.last):
            return False
        if self.first and step < round(max_steps * self.first):
            return True
        drawn = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn) < self.share * 2**64

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not _mixers(pl_module):
            raise ValueError(
                "MixedWindows: expected layers with dynamic masks, got a model with attention "
                f"{decoder_of(pl_module).config.attention}; train dma, or leave this callback out"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.first and not self.last:
            return
        steps = trainer.max_steps if trainer.max_steps > 0 else total_steps(trainer)  # as for the learning rate
        if steps is None:
            raise ValueError(
                f"MixedWindows: first {self.first} and last {self.last} are shares of all steps: expected "
                f"trainer.max_steps, or trainer.max_epochs and data of a known length, got max_steps "
                f"{trainer.max_steps} and max_epochs {trainer.max_epochs}; set max_steps, or first and last to 0"
            )
        self._steps = steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore()  # after a batch that was skipped
        if self.keeps_all(trainer.global_step, self._steps):
            self._own = [(mixer, mixer.keep) for mixer in _mixers(pl_module)]
            every = KeepRule(decoder_of(pl_module).config.max_position_embeddings)
            for mixer, _ in self._own:
                mixer.keep = every

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_logging_step(trainer, before_step=True):
            pl_module.log("dma/keeps_all", float(bool(self._own)))
        self._restore()  # not earlier: checkpointed layers are computed again in the backward pass

    def on_train_batch_end(self, *_: Any) -> None:
        self._restore()  # after a batch without a backward pass

    def on_validation_start(self, *_: Any) -> None:
        self._restore()

    def on_train_end(self, *_: Any) -> None:
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for mixer, own in self._own:
            mixer.keep = own
        self._own = []


def learns_ranks(module: pl.LightningModule) -> bool:
    """Whether a retention loss trains the ranks of a model's dynamic masks."""
    return any(isinstance(x, DynamicMaskAttention) and x.retention_weight > 0 for x in decoder_of(module).mixers)


def _mixers(module: pl.LightningModule) -> list[HasKeepRule]:
    """The mixers of layers that keep keys by a rule."""
    return [mixer for mixer in decoder_of(module).mixers if isinstance(mixer, HasKeepRule)]
