"""A callback for tests: every process writes its own values of the metrics."""

import json
from pathlib import Path

import lightning.pytorch as pl


class WriteMetrics(pl.Callback):
    """Write the callback metrics of each rank to `folder/rank<i>.json` at the end of `fit`.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(metrics))
