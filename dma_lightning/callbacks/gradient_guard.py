"""Detects optimizer steps that would ruin a run by their loss and gradients; skips these steps or stops the run.

P number of parameter tensors.
"""

import math
from collections import deque
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dma_lightning.trainer_state import is_logging_step

OnNonFinite = Literal["stop", "skip"]
OnSpike = Literal["stop", "skip", "ignore"]


class UnstableTrainingError(RuntimeError):
    """A loss or gradient that training cannot continue with; the weights in memory may be ruined and are not saved."""


class GradientGuard(pl.Callback):
    """Stops at, or skips, optimizer steps whose gradient is not finite or whose loss jumps up.

    It watches a `LanguageModel` and judges the mean loss over all labels of a step.

    Messages name the step, and the parameter whose gradient was the first in the backward pass not to be finite. A
    skipped step changes no weight and no moment; the schedule goes on.

    To skip steps, the CPU must wait for the gradients of every step. Otherwise gradients on a GPU are read only at
    logging steps, in all processes at once, and before validations and checkpoints; on a CPU, one step late.

    Args:
        not_finite: what to do at a gradient with a NaN or infinity: stop or skip.
        spike: what to do when the loss jumps: stop, skip or ignore.
        spike_factor: a loss above this many times its running mean is a jump.
        window: optimizer steps in the running mean; a loss counts as a jump only after this many steps.
        max_skipped: how many steps in a row may be skipped; one more stops the run.

    Raises:
        ValueError: on values out of range, or with precision 16-mixed, whose scaler meets infinities regularly.
        UnstableTrainingError: when it stops the run.
    """

    def __init__(
        self,
        not_finite: OnNonFinite = "stop",
        spike: OnSpike = "ignore",
        spike_factor: float = 2.0,
        window: int = 50,
        max_skipped: int = 10,
    ) -> None:
        if not_finite not in get_args(OnNonFinite) or spike not in get_args(OnSpike):
            raise ValueError(
                f"expected not_finite of {get_args(OnNonFinite)} and spike of {get_args(OnSpike)}, "
                f"got {not_finite!r} and {spike!r}"
            )
        if spike_factor <= 1 or window < 1 or max_skipped < 0:
            raise ValueError(
                "expected spike_factor > 1, window >= 1 and max_skipped >= 0, "
                f"got {spike_factor}, {window} and {max_skipped}"
            )
        self.not_finite, self.spike, self.spike_factor = not_finite, spike, spike_factor
        self.window, self.max_skipped = window, max_skipped
        self.skipped_in_a_row = 0
        self._mean, self._count = 0.0, 0  # running mean of the losses; number of losses, at most `window`
        self._unread: deque[_Readings] = deque()

    def state_dict(self) -> dict[str, Any]:
        self._read(wait=True)  # judge the last step before any checkpoint is written
        return {"mean": self._mean, "count": self._count, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._mean, self._count = state_dict["mean"], state_dict["count"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.precision == "16-mixed":
            raise ValueError("GradientGuard: expected a precision other than 16-mixed, which skips steps by itself")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._read(wait=is_logging_step(trainer, before_step=True))
        loss = pl_module.step_loss
        assert isinstance(loss, Tensor)  # a `LanguageModel` sets it before the backward pass
        self._unread.append(_Readings.take(trainer.global_step + 1, loss.float(), pl_module))
        if "skip" in (self.not_finite, self.spike) and self._read(wait=True):
            for parameter in pl_module.parameters():
                parameter.grad = None  # so the step changes nothing

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(wait=True)  # neither validate nor save a model that a step has ruined

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(wait=True)

    def _read(self, wait: bool = False) -> bool:
        """Judge the steps whose readings are there, or with `wait` all; True if the last of them is to be skipped."""
        left_out = False
        while self._unread and (wait or self._unread[0].arrived is None):
            left_out = self._judge(self._unread.popleft())
        return left_out

    def _judge(self, step: "_Readings") -> bool:
        """Whether to skip a step."""
        loss, *norms = step.values()
        if bad := [name for name, norm in zip(step.names, norms, strict=True) if not norm < float("inf")]:
            what = (
                f"step {step.number}: the gradient of {bad[-1]} is not finite, the first in the backward pass of "
                f"{len(bad)} of {len(norms)}, and the loss is {loss:.4g}"
            )
            return self._act(self.not_finite, what)
        if self.spike != "ignore" and self._count >= self.window and not loss <= self.spike_factor * self._mean:
            largest = max(zip(norms, step.names, strict=True))
            what = (
                f"step {step.number}: the loss of {loss:.4g} is more than {self.spike_factor} times its mean of "
                f"{self._mean:.4g}; the largest gradient, {largest[0]:.4g}, is that of {largest[1]}"
            )
            return self._act(self.spike, what)
        if loss == 0 or not math.isfinite(loss):
            return False  # no labels, or a non-finite loss with finite gradients: the mean learns nothing from it
        self._count = min(self._count + 1, self.window)
        self._mean += (loss - self._mean) / self._count
        self.skipped_in_a_row = 0
        return False

    def _act(self, action: Literal["stop", "skip"], what: str) -> bool:
        self.skipped_in_a_row += 1
        if action == "stop" or self.skipped_in_a_row > self.max_skipped:
            skips = action == "skip"
            after = f" after {self.max_skipped} skipped steps in a row" if skips else ""
            raise UnstableTrainingError(
                f"{what}; stopped{after}. The last checkpoint is from before: resume from it with another learning "
                f"rate, data or precision, or let the guard skip {'more (max_skipped)' if skips else 'such steps'}"
            )
        rank_zero_warn(f"{what}; this step is left out")
        return True


class _Readings(NamedTuple):
    """Loss and gradient norms of one step; they may still be on their way from the device."""

    number: int
    names: list[str]
    numbers: Tensor  # [1 + P]
    arrived: torch.cuda.Event | None

    @classmethod
    def take(cls, number: int, loss: Tensor, module: pl.LightningModule) -> "_Readings":
        found = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in found]))  # as torch's clip_grad_norm_ does
        norms = norms.full_tensor() if isinstance(norms, DTensor) else norms
        numbers = torch.cat([loss.reshape(1), norms.float()])
        arrived = None
        if numbers.is_cuda:
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return cls(number, [name for name, _ in found], numbers, arrived)

    def values(self) -> list[float]:
        """The numbers, as soon as they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()
