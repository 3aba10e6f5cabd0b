"""`dma-lightning init`: writes a config to start from, with explained options."""

import shlex
from pathlib import Path

from dma_lightning.data.find_files import user_path
from dma_lightning.files.atomic import atomic_write

STARTING_CONFIG = Path(__file__).with_name("starting_config.yaml")
_NAME = "config.yaml"


def init(folder: Path) -> None:
    """Write a config for `fit`, with a comment on each option of model, data, trainer and callbacks.

    Unchanged, it trains a small model on a CPU in a few minutes, on text that needs no download.

    Args:
        folder: folder for config.yaml. It may exist, but must not contain a config.yaml.

    Raises:
        ValueError: if it contains one, or is a file.
    """
    folder = user_path(folder)
    path = folder / _NAME
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder or none, got the file {folder}; name another")
    if path.exists() or path.is_symlink():
        raise ValueError(f"folder: expected no {_NAME} in it, since nothing is overwritten, got {path}; name another")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(STARTING_CONFIG.read_bytes())
    print(f"{path}: change what you like; train with\n\n    dma-lightning fit -c {shlex.quote(str(path))}\n")
