"""Checkpoints: when they are saved, what they may contain, and how to read them without running code from them.

- `resumable`: the callback that saves a run so that it can resume exactly
- `io`: writes checkpoints whole or not at all, reads them safely, and finds the newest of a run
- `sharded`: folders that hold one part from each FSDP2 process
- `content_types`: the required types of a checkpoint's parts
- `arguments`: a model's arguments, as plain values of known fields
- `weights`: compares weights with a model's before allocating memory
- `random_states`: random states of every process, so that a resumed run draws the same numbers

`dma_lightning.trained_models` loads models for inference from checkpoints.
"""

from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.checkpoints.resumable import ResumableCheckpoint

__all__ = ["AtomicCheckpointIO", "ResumableCheckpoint"]
