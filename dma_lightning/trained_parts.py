"""Which part of a model is trained: all of it, its attention, or only the selection of keys."""

from typing import Literal, get_args

from torch import nn

from dma_lightning.model import DogeForCausalLM

TrainedPart = Literal["all", "attention", "selection"]


def freeze_others(model: DogeForCausalLM, part: TrainedPart) -> None:
    """Train only a part of a model: freeze the other parameters.

    Args:
        model: the decoder.
        part: `all`; `attention`, the mixers of all layers; or `selection`, the parameters that determine the ranks of
            keys.

    Raises:
        ValueError: for an unknown part, or for `selection` if the attention selects no keys.
    """
    if part not in get_args(TrainedPart):
        raise ValueError(f"train_only: expected one of {list(get_args(TrainedPart))}, got {part!r}")
    trained: set[nn.Parameter] = set()
    for mixer in model.mixers:
        names = (name for name, _ in mixer.named_parameters())
        trained.update(map(mixer.get_parameter, mixer.selection_parameters if part == "selection" else names))
    if part == "selection" and not trained:
        raise ValueError(
            f"train_only: expected all or attention with attention {model.config.attention!r}, which does not rank "
            "keys, got selection; change one of them"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(part == "all" or parameter in trained)
