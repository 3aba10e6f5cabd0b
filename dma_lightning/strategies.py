"""FSDP2 and context parallelism, as a strategy that configurations can name."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from dma_kernels.context import ContextGroup
from dma_lightning.checkpoints.io import check_readable, read_checkpoint
from dma_lightning.checkpoints.sharded import META, load_sharded, remove, replace_folder
from dma_lightning.optimizers import check_same_optimizer, kind_of

_FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: every process keeps a part of each layer's weights, gradients and moments, and gathers them when needed.

    Args:
        save_distributed_checkpoint: write a folder with one file per process. Otherwise, write a single file, like a
            run with one process.
        process_group_backend: nccl or gloo. Default: the one that fits the device.
        timeout: how long a process waits for another before it gives up.
        context_parallel_size: how many processes divide each sequence among them, with attention `dma` or `swa`. They
            read the same sequences, and each takes a part of equal length.

    Raises:
        ValueError: if the size is below 1; later, if it does not divide the number of processes.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        context_parallel_size: int = 1,
    ) -> None:
        if context_parallel_size < 1:
            raise ValueError(f"context_parallel_size: expected at least 1, got {context_parallel_size}")
        self.context_parallel_size = context_parallel_size
        super().__init__(
            tensor_parallel_size=context_parallel_size,  # Lightning's name for the second dimension of the mesh
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        processes = self.num_nodes * self.num_processes
        self._data_parallel_size, rest = divmod(processes, self.context_parallel_size)
        if rest:
            raise ValueError(
                f"context_parallel_size: expected a divisor of the number of processes, got "
                f"{self.context_parallel_size} of {processes}; change it, trainer.devices or trainer.num_nodes"
            )
        super().setup_environment()

    @property
    def context_group(self) -> ContextGroup | None:
        """The processes that divide sequences with this one, once they are connected; None if sequences stay whole."""
        if self.context_parallel_size == 1:
            return None
        return ContextGroup.of(self.device_mesh["tensor_parallel"].get_group())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as a single process saves it, with parameters numbered as in the optimizer's groups.

        (Lightning's version numbers them as in the model, which is another order if there are several groups.)
        """
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = get_optimizer_state_dict(self._own_model, optimizer, options=_FULL_STATE)
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        return _renamed(state, numbers) if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a folder gets its name only when it is complete and readable."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        unfinished = path.with_name(f"{path.name}.tmp")
        if self.is_global_zero:
            remove(unfinished)  # left by a killed process, or a link to a folder elsewhere
        self.barrier()
        super().save_checkpoint(checkpoint, unfinished, storage_options)
        self.barrier()
        if self.is_global_zero:
            check_readable(unfinished / META)
            replace_folder(unfinished, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Give every process its part of a checkpoint, which any number of processes may have saved."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path)
        if path.is_dir():
            saved = checkpoint.get("hyper_parameters", {}).get("optimizer", "adamw")
            for optimizer in self.optimizers:
                check_same_optimizer(saved, kind_of(optimizer.param_groups), f"{path}")
            load_sharded(path, self._own_model, self.optimizers)
            return checkpoint
        set_model_state_dict(self._own_model, checkpoint.pop("state_dict"), options=_FULL_STATE)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            saved = kind_of(state["param_groups"])
            check_same_optimizer(saved, kind_of(optimizer.param_groups), f"{path}")  # before torch compares moments
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self._own_model, optimizer, named, options=_FULL_STATE)
        return checkpoint

    @property
    def _own_model(self) -> nn.Module:
        """The part of the model in this process; not available before the model is set up."""
        assert self.model is not None
        return self.model

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in the order of its groups."""
        names = {parameter: name for name, parameter in self._own_model.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer state with other keys for the parameters."""
    groups = [group | {"params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}
