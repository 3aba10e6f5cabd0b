"""`dma-lightning init`: a config to start from, which says what its options do."""

import shlex
from pathlib import Path

from dma_lightning.data.find_files import user_path
from dma_lightning.files.atomic import atomic_write

STARTING_CONFIG = Path(__file__).with_name("starting_config.yaml")
_NAME = "config.yaml"


def init(folder: Path) -> None:
    """Write a config of model, data, trainer and callbacks, with a comment for each option, that `fit` runs as it is.

    It trains a small model on a CPU in a few minutes, on text that needs no download.

    Args:
        folder: where config.yaml is written. It may exist, but must not hold a config.yaml.

    Raises:
        ValueError: if it holds one, or is a file.
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
