"""Adding dynamic masks to a Transformers model, and loading a model that has them."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel

from dma_kernels import ScoreForm
from dma_lightning.backends import Backend, check_backend
from dma_lightning.transformers.attention import dynamic_mask_attention
from dma_lightning.transformers.cache import pass_cache_on
from dma_lightning.transformers.layers import DynamicMask, MaskSettings, SlidingWindow, attention_layers
from dma_lightning.transformers.masks import packing_of

NAME = "dma"  # name of the attention implementation


def register() -> None:
    """Register the attention implementation with Transformers under its name."""
    AttentionInterface.register(NAME, dynamic_mask_attention)
    AttentionMaskInterface.register(NAME, packing_of)


def add_dynamic_masks(
    model: PreTrainedModel,
    *,
    keep_window_size: int,
    keep_last: int = 0,
    sinks: int = 0,
    score_form: ScoreForm = "exp",
    backend: Backend = "auto",
) -> None:
    """Make a Transformers decoder attend with dynamic masks; each attention layer gets `A` and `dt_proj`.

    `A` starts at 0, so each query sees its last `keep_window_size + keep_last` keys: on sequences up to this length,
    the model is unchanged. Layers with their own sliding window keep it. `model.config` gets `dynamic_masks`.

    Args:
        model: the model to change.
        keep_window_size: number of best-ranked keys that a query keeps.
        keep_last: number of last positions that are visible regardless of rank; the best-ranked keys are chosen from
            the positions before them.
        sinks: number of first keys of each document that also stay visible.
        score_form: what is added to the logits: `exp` of the rank, or the rank itself (`linear`).
        backend: `triton`, `flex`, `torch`, `reference` or `auto`; not saved.

    Raises:
        ValueError: if a size is out of range, or the model is not such a decoder or already has dynamic masks.
    """
    settings = MaskSettings(
        keep_window_size=keep_window_size, keep_last=keep_last, sinks=sinks, score_form=score_form
    )  # fmt: skip
    check_backend(backend)
    config, name = model.config, type(model).__name__
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{name}: expected a text-only model, got one with several parts; pass its language model")
    layers = attention_layers(model)
    if any(hasattr(layer, "dynamic_mask") for layer in layers):
        raise ValueError(f"{name}: expected a model without dynamic masks, got one with them; reload the model")
    windows = [_sliding_window(config, index) for index in range(len(layers))]
    if all(windows):
        raise ValueError(
            f"{name}: expected a layer that sees its whole past, got sliding_window {windows[0]} in all layers; load "
            "the model with sliding_window=None"
        )
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ValueError(f"{name}: expected a model whose attention can be chosen (AttentionInterface), got another")
    for layer, window in zip(layers, windows, strict=True):
        if window is None:
            layer.dynamic_mask = _new_mask(model, layer, settings, backend)
        else:
            layer.dynamic_mask = SlidingWindow(window, backend)
        layer.register_forward_pre_hook(pass_cache_on, with_kwargs=True)
    config.dynamic_masks = dataclasses.asdict(settings)


def load_with_dynamic_masks(folder: Path | str, *, backend: Backend = "auto", **options: Any) -> PreTrainedModel:
    """Load a model with dynamic masks that its `save_pretrained` wrote.

    Args:
        folder: the folder that `save_pretrained` wrote.
        backend: as in `add_dynamic_masks`.
        options: options of `from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        ValueError: if the folder holds a model without dynamic masks, or the weights of its masks are missing.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        settings = msgspec.convert(getattr(config, "dynamic_masks", None), MaskSettings)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"{folder}: expected dynamic_masks in config.json, as a model with dynamic masks writes them: {error}; "
            "load other models with from_pretrained and call add_dynamic_masks"
        ) from error
    kind = _class_of(config, folder)

    class WithMasks(kind):  # type: ignore[misc, valid-type]  # has all parameters before loading weights
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            add_dynamic_masks(self, backend=backend, **dataclasses.asdict(settings))

    # Transformers looks up weight renamings by class name, and attention support in the class's module.
    WithMasks.__name__, WithMasks.__module__ = kind.__name__, kind.__module__
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, told = WithMasks.from_pretrained(folder, config=config, **options)
    if missing := sorted(name for name in told["missing_keys"] if "dynamic_mask" in name):
        raise ValueError(f"{folder}: expected weights of dynamic masks, but {missing} are missing")
    model.__class__ = kind  # so that it is saved and copied as its original class
    return model


def _class_of(config: PreTrainedConfig, folder: Path | str) -> type[PreTrainedModel]:
    """The class that `config.json` names."""
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"{folder}: expected one model class of Transformers as architectures, got {names}")
    return kind


def _sliding_window(config: PreTrainedConfig, layer: int) -> int | None:
    """The model's own window in a layer, or None if the layer sees its whole past."""
    kinds = getattr(config, "layer_types", None)
    kind = "full_attention" if kinds is None else kinds[layer]
    if kind not in ("full_attention", "sliding_attention"):
        raise ValueError(f"layer_types: expected full_attention or sliding_attention, got {kind!r} in layer {layer}")
    return getattr(config, "sliding_window", None) if kinds is None or kind == "sliding_attention" else None


def _new_mask(model: PreTrainedModel, layer: nn.Module, settings: MaskSettings, backend: Backend) -> DynamicMask:
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(layer, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = heads // getattr(layer, "num_key_value_groups", 1)
    like = next(layer.parameters())
    mask = DynamicMask(kv_heads, head_dim, settings, backend, like, model.dtype)
    nn.init.normal_(mask.dt_proj.weight, std=getattr(config, "initializer_range", 0.02))
    return mask
