"""The optimizer: AdamW, or Muon for the matrices within layers and AdamW for everything else.

M, N rows and columns of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Muon, Optimizer

from dma_lightning.model import DogeForCausalLM
from dma_lightning.trainer_state import let_clip_gradients

OptimizerName = Literal["adamw", "muon"]

# Options of a parameter group that a checkpoint restores. All others say how this run computes.
_SAVED = ("params", "lr", "initial_lr", "weight_decay", "betas")
_MOMENTUM = "momentum_buffer"  # torch's name in the state of Muon


class MuonAdamW(Optimizer):
    """Muon for some matrices and AdamW for all other parameters, as one optimizer.

    Muon steps along the orthogonalized momentum of a matrix. The step is scaled to the size that AdamW's usually has
    (`match_rms_adamw`), so both parts use the same learning rate and weight decay.

    `param_groups` begins with Muon's group, and continues with those of AdamW. Both parts use these groups and `state`
    themselves, so schedules and checkpoints reach both.

    Args:
        matrices: parameters `[M, N]` that Muon trains. With FSDP2, every process gathers the whole gradient and
            momentum of one matrix at a time, and keeps its own rows.
        others: parameter groups that AdamW trains.
        lr: learning rate.
        fused: whether AdamW is one kernel; None: as torch chooses.

    Raises:
        ValueError: if a parameter is in two groups, or one of Muon's is not a matrix.

    Source: arXiv 2502.16982; `torch.optim.Muon`.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[dict[str, Any]],
        lr: float,
        fused: bool | None = None,
    ) -> None:
        self._muon = Muon([{"params": list(matrices)}], lr=lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, lr=lr, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_muon": self._muon, "_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # torch also calls this when it loads a state, with new groups
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which AdamW trains."""
        super().add_param_group(param_group)
        known = (*self._muon.param_groups, *self._adamw.param_groups)
        if all(param_group is not group for group in known):
            self._adamw.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both parts; returns what the closure does, which computes loss and gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_muon()
        self._adamw.step()
        return loss

    def _step_muon(self) -> None:
        group = self._muon.param_groups[0]
        if not any(isinstance(parameter, DTensor) for parameter in group["params"]):
            self._muon.step()
            return
        for parameter in group["params"]:
            if parameter.grad is not None:
                with _whole(parameter, self.state[parameter]):
                    self._muon.param_groups = [group | {"params": [parameter]}]
                    self._muon.step()
        self._share()

    def _share(self) -> None:
        """Let both parts use the groups and the state of this optimizer."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state


def make_optimizer(
    name: OptimizerName, module: nn.Module, decoder: DogeForCausalLM, lr: float, fused: bool | None
) -> Optimizer:
    """The optimizer of all parameters of a module.

    Args:
        name: `adamw`, or `muon` for `MuonAdamW` with the decoder's hidden matrices.
        module: the decoder, or a module around it.
        decoder: says which parameters are hidden matrices, and which have no weight decay.
        lr: learning rate.
        fused: whether AdamW is one kernel; None: as torch chooses.

    Returns:
        An optimizer whose last group is everything without weight decay: vectors, and what a mixer names in
        `undecayed_parameters`. It loads only states of the same optimizer, and takes only learning rate, weight decay
        and betas from them; its other options stay.
    """
    kept = {mixer.get_parameter(name) for mixer in decoder.mixers for name in mixer.undecayed_parameters}
    parameters = list(module.parameters())
    decayed = [p for p in parameters if p.ndim >= 2 and p not in kept]
    others = [p for p in parameters if p.ndim < 2 or p in kept]  # norms, residual weights, A, contents
    optimizer: Optimizer
    if name == "muon":
        hidden = _hidden_matrices(decoder)
        matrices, decayed = [p for p in decayed if p in hidden], [p for p in decayed if p not in hidden]
        optimizer = MuonAdamW(matrices, [{"params": decayed}, {"params": others}], lr, fused)
    else:
        optimizer = AdamW([{"params": decayed}, {"params": others}], lr=lr, fused=fused)
        let_clip_gradients(optimizer)
    optimizer.register_load_state_dict_pre_hook(_with_own_options)
    return optimizer


def check_optimizer(name: str, lr: float, weight_decay: float, betas: Sequence[float]) -> None:
    """Check the name of an optimizer and its rates.

    Raises:
        ValueError: for an unknown name, or a learning rate, weight decay or betas that are out of range.
    """
    if lr <= 0 or weight_decay < 0:
        raise ValueError(f"expected lr > 0 and weight_decay >= 0, got {lr} and {weight_decay}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers, each at least 0 and below 1, got {betas}")
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer: expected one of {list(get_args(OptimizerName))}, got {name!r}")


def check_same_optimizer(saved: str, own: str, where: str) -> None:
    """Refuse the state of one optimizer for another, as its moments mean something else.

    Args:
        saved: name of the optimizer of a checkpoint.
        own: name of the optimizer of this run.
        where: the beginning of the error message.

    Raises:
        ValueError: if they differ.
    """
    if saved != own:
        raise ValueError(
            f"{where}: expected a state of optimizer {own!r}, as in this run, got one of {saved!r}; set "
            f"model.optimizer to {saved}, or start a separate run from the weights with model.init_from"
        )


def kind_of(groups: Iterable[Mapping[str, Any]]) -> OptimizerName:
    """Which optimizer has such parameter groups; they may come from the optimizer or from its saved state."""
    return "muon" if any("ns_steps" in group for group in groups) else "adamw"


def weights_with_one_moment(name: OptimizerName, decoder: DogeForCausalLM) -> int:
    """Number of weights for which an optimizer keeps one moment instead of AdamW's two."""
    return sum(matrix.numel() for matrix in _hidden_matrices(decoder)) if name == "muon" else 0


def _with_own_options(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved state in which the options are those of this run, whose device and precision may differ."""
    check_same_optimizer(kind_of(state["param_groups"]), kind_of(optimizer.param_groups), "optimizer_states")
    groups = [
        own | {key: saved[key] for key in _SAVED if key in saved}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False)  # torch compares the numbers
    ]
    return state | {"param_groups": groups}


def _hidden_matrices(decoder: DogeForCausalLM) -> set[nn.Parameter]:
    """Weights `[M, N]` of linear maps within layers, except those whose rows are independent."""
    separate: set[nn.Parameter] = set()
    for mixer in decoder.mixers:
        separate.update(map(mixer.get_parameter, (*mixer.per_head_parameters, *mixer.auxiliary_parameters)))
    linear = (module for module in decoder.layers.modules() if isinstance(module, nn.Linear))
    return {cast("nn.Parameter", module.weight) for module in linear} - separate


@contextmanager
def _whole(parameter: nn.Parameter, state: dict[str, Any]) -> Iterator[None]:
    """A context in which this process has the whole gradient and momentum of a sharded matrix.

    Muon then computes as in a single process, and writes this process's rows of the matrix.
    """
    matrix, part = cast("DTensor", parameter), cast("DTensor", parameter.grad)
    whole = [Replicate()] * matrix.device_mesh.ndim
    parameter.grad = cast("Tensor", part.redistribute(placements=whole))
    if _MOMENTUM in state:
        state[_MOMENTUM] = state[_MOMENTUM].redistribute(placements=whole)
    yield
    state[_MOMENTUM] = state[_MOMENTUM].redistribute(placements=matrix.placements)
    parameter.grad = cast("Tensor", part)
