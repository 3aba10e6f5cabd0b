"""The traffic between processes that divide sequences, at logging steps."""

from collections.abc import Callable

import lightning.pytorch as pl

from dma_kernels.context import traffic
from dma_lightning.model import decoder_of
from dma_lightning.trainer_state import accumulates, is_logging_step, is_of_logging_step

_MIB = 2**20


class ContextMonitor(pl.Callback):
    """Logs how much a process sends and receives in a step if processes divide sequences (context parallelism).

    The figures are those of the first process; the others of its group send and receive as much. They cover the
    exchanges in the forward and backward passes of all batches of the step, without the traffic of FSDP2. On GPUs, the
    callback also logs how long these exchanges take, including the time in which the first process waits for others. In
    steps that do not log, nothing is timed. Without context parallelism, it logs nothing.
    """

    log_dict: Callable[..., None]  # the module's; Lightning gives it to callbacks

    def on_train_start(self, *_: object) -> None:
        self.bytes, self.milliseconds = 0, 0.0  # of the batches of a step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if decoder_of(pl_module).context is None:
            return
        self.before = traffic.bytes
        self.timed = is_of_logging_step(trainer)
        if self.timed:
            traffic.start_timing()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if decoder_of(pl_module).context is None:
            return
        self.bytes += traffic.bytes - self.before
        if self.timed:
            self.milliseconds += traffic.stop_timing()
        if is_logging_step(trainer):
            figures = {"context/mib_per_step": self.bytes / _MIB}
            if self.timed and pl_module.device.type == "cuda":
                figures["context/ms_per_step"] = self.milliseconds
            self.log_dict(figures)
        if not accumulates(trainer):
            self.bytes, self.milliseconds = 0, 0.0
