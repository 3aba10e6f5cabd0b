"""The command line.

- `entry`: the console script and the list of commands
- `lightning_cli`: Lightning's commands `fit`, `validate`, `test` and `predict`
- `ckpt_path`: finds the checkpoint that `ckpt_path` names, and reads model and data arguments from it
- `shipped_configs`: finds the configs that `-c` takes by name
- `default_callbacks`: adds monitors, guard and checkpoints to every run
- `init`, `generate`, `prepare`, `train_tokenizer`, `sizes`, `huggingface`: our own commands
- `needle`, `extrapolation`, `positions`: commands that evaluate a checkpoint
- `parsing`: reads arguments
- `usage`: explains what is wrong with a command line
- `trainer_options`: checks accelerator and strategy
- `errors`: prints a one-line message for errors that a user can fix
- `unstarted_runs`: deletes the folder of a run that ends before it trains
"""

from dma_lightning.cli.entry import DMACLI, build_cli, main

__all__ = ["DMACLI", "build_cli", "main"]
