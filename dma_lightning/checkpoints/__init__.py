"""Checkpoints: when they are written, what may stand in them, and how they are read without running what they hold.

- `resumable`: the callback that saves a run, so that it can go on exactly
- `io`: checkpoints written whole or not at all, and read safely; the newest of a run
- `sharded`: folders to which every process of FSDP2 has written its part
- `content_types`: the types of all parts, whoever wrote them
- `arguments`: the arguments of a model, as plain values of known fields
- `weights`: weights compared with those of a model, before any memory is taken
- `random_states`: of every process, so that a resumed run draws the same numbers

Models for inference come out of checkpoints in `dma_lightning.trained_models`.
"""

from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.checkpoints.resumable import ResumableCheckpoint

__all__ = ["AtomicCheckpointIO", "ResumableCheckpoint"]
