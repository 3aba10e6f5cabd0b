"""Which curves TensorBoard shows together, and in what order."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from dma_lightning.mixers import DynamicMaskAttention
from dma_lightning.model import decoder_of

# Title of a chart, and the tags of its curves as regular expressions that must match at the start.
_RUN = {
    "loss": ["train/loss$", "val/loss$"],
    "perplexity": ["train/perplexity$", "val/perplexity$"],
    "bits per byte": ["train/bits_per_byte$", "val/bits_per_byte$"],
    "accuracy": ["val/accuracy$", "val/answers$"],
    "learning rate": ["lr-"],
    "tokens per second": ["speed/tokens_per_s$"],
    "utilization": ["speed/mfu$"],
    "norm of the gradient": ["grad_norm$"],
    "memory": ["memory/"],
}
_PAGE = "http://localhost:6006/#custom_scalars"
_FIGURES_OF_LAYERS = ("births", "own_key", "mean_lifetime", "live_fraction")


class CurveOverview(pl.Callback):
    """Arranges TensorBoard's page CUSTOM SCALARS: loss, perplexity, learning rate and speed first, then the layers.

    (TensorBoard's first page sorts groups by name, and so shows `dma` before `train` and `val`.) Each figure of layers
    with dynamic mask attention is one chart with a curve for each layer. The page's address is printed.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        charts = {"Run": _RUN}
        if any(isinstance(mixer, DynamicMaskAttention) for mixer in decoder_of(pl_module).mixers):
            charts["Layers"] = {name: [rf"dma/layer_\d+/{name}$"] for name in _FIGURES_OF_LAYERS}
        layout = {
            category: {title: ["Multiline", tags] for title, tags in of_one.items()}
            for category, of_one in charts.items()
        }
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)
                trainer.print(f"curves: tensorboard --logdir {logger.log_dir}, then {_PAGE}")
