"""Hyper-parameters beside how far the run came."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger


class FinalMetrics(pl.Callback):
    """Writes the hyper-parameters of model and data with the last validation's figures, for the page HPARAMS."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = {name: x for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        metrics = {f"final/{name.removeprefix('val/')}": x.item() for name, x in last.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and metrics:
                params = {name: x for name, x in logger.hparams.items() if not name.startswith("_")}
                logger.log_hyperparams(params, metrics, trainer.global_step)
                logger.experiment.flush()
