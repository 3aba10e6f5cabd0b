"""Final metrics next to the hyperparameters."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger


class FinalMetrics(pl.Callback):
    """Writes the last validation's metrics next to the hyperparameters of model and data: TensorBoard's page HPARAMS.

    Other loggers have the hyperparameters from the start and get the metrics at the run's last step.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = {name: x for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        metrics = {f"final/{name.removeprefix('val/')}": x.item() for name, x in last.items()}
        for logger in trainer.loggers if metrics else ():
            if isinstance(logger, TensorBoardLogger):
                params = {name: x for name, x in logger.hparams.items() if not name.startswith("_")}
                logger.log_hyperparams(params, metrics, trainer.global_step)
                logger.experiment.flush()
            else:
                logger.log_metrics(metrics, trainer.global_step)
