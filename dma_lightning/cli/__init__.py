"""The command line.

- `entry`: the console script, and which commands there are
- `lightning_cli`: `fit`, `validate`, `test` and `predict`, which are Lightning's
- `ckpt_path`: which checkpoint that option stands for, and what it says about model and data
- `shipped_configs`: those that `-c` finds by name; `default_callbacks`: monitors, guard and checkpoints
- `init`, `generate`, `prepare`, `train_tokenizer`, `sizes`, `huggingface`: commands of our own
- `needle`, `extrapolation`, `positions`: those that evaluate a checkpoint
- `parsing`: how arguments are read
- `usage`: what is wrong with a command line; `trainer_options`: with accelerator and strategy
- `errors`: which errors are told in one line; `unstarted_runs`: no folder of a run that ends before it trains
"""

from dma_lightning.cli.entry import DMACLI, build_cli, main

__all__ = ["DMACLI", "build_cli", "main"]
