"""`dma-lightning merge-lora` and `export-lora`: merge adapters into the weights, or write them to a folder."""

from pathlib import Path

from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.huggingface.doge import new_folder
from dma_lightning.language_model import LanguageModel
from dma_lightning.lora import Lora, as_peft_model, has_adapters, with_adapters_of
from dma_lightning.saved_run import SavedRun
from dma_lightning.trained_models import model_of, open_checkpoint

# What a checkpoint holds for resuming.
_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "MixedPrecision")


def merge_lora(ckpt_path: Path, target: Path, adapter: Path | None = None) -> None:
    """Merge adapters into the weights, and write an ordinary checkpoint, for `generate`, `export-hf` and `init_from`.

    The new checkpoint works without peft. It has no training state, so `fit` cannot resume from it.

    Args:
        ckpt_path: a checkpoint of a run with --model.lora; with --adapter, a checkpoint without adapters.
        target: the new checkpoint file; it must not exist.
        adapter: folder with adapters that peft or `export-lora` saved. Default: the adapters in the checkpoint.
    """
    if target.exists():
        raise ValueError(f"target: expected a new file, got {target}, which exists; nothing is overwritten")
    saved = open_checkpoint(ckpt_path, "cpu")
    module = model_of(saved, "cpu")
    if adapter is None:
        wrapped = as_peft_model(module.model, _lora(saved, module))
    elif has_adapters(saved.weights):
        raise ValueError(
            f"ckpt_path: expected a checkpoint without adapters, since --adapter is given, got {ckpt_path}, which has "
            "some; leave out --adapter to merge these"
        )
    else:
        wrapped = with_adapters_of(module.model, adapter)
    weights = wrapped.merge_and_unload(safe_merge=True).state_dict()
    content = {name: x for name, x in saved.content.items() if name not in _TRAINING}
    arguments = dict(content[module.CHECKPOINT_HYPER_PARAMS_KEY])
    arguments.pop("lora", None)
    content[module.CHECKPOINT_HYPER_PARAMS_KEY] = arguments
    content["state_dict"] = {f"model.{name}": x for name, x in weights.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    AtomicCheckpointIO().save_checkpoint(content, target)
    print(f"written to {target}")


def export_lora(ckpt_path: Path, target: Path) -> None:
    """Write the adapters of a checkpoint in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        ckpt_path: a checkpoint of a run with --model.lora.
        target: the new folder; it must not exist.
    """
    saved = open_checkpoint(ckpt_path, "cpu")
    module = model_of(saved, "cpu")
    wrapped = as_peft_model(module.model, _lora(saved, module))
    with new_folder(target) as unfinished:
        wrapped.save_pretrained(unfinished)
    print(f"written to {target}")


def _lora(saved: SavedRun, module: LanguageModel) -> Lora:
    """The adapters of a checkpoint.

    Raises:
        ValueError: if it has none.
    """
    if module.hparams.lora is None:
        raise ValueError(
            f"ckpt_path: expected a checkpoint of a run with --model.lora, got {saved.path}, which is without adapters"
        )
    return Lora.of(module.hparams.lora)
