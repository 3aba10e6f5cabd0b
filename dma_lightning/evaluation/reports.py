"""What a command says: tables, and a file."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dma_lightning.data.find_files import user_path
from dma_lightning.evaluation.costs import Cost
from dma_lightning.evaluation.reading import Reader
from dma_lightning.evaluation.trained_run import TrainedRun
from dma_lightning.files.atomic import atomic_write

COST_COLUMNS = ("prompt, µs per token", "step, ms", "cache, KiB per sequence", "peak memory, MiB")


def new_file(output: Path | None) -> Path | None:
    """A file that can be written, looked at before the work begins.

    Raises:
        ValueError: if it is there, or its folder is not.
    """
    if output is None:
        return None
    output = user_path(output)
    if output.exists():
        raise ValueError(f"output: expected no such file, since nothing is overwritten, got {output}; name another")
    if not output.parent.is_dir():
        raise ValueError(f"output: expected a file in a folder that is there, got {output}; make the folder")
    return output


def write_report(output: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; figures that are no numbers are null."""
    with atomic_write(output) as file:
        file.write(json.dumps(_plain(content), indent=1, allow_nan=False).encode())


def facts(run: TrainedRun, reader: Reader) -> dict[str, Any]:
    """What figures depend on: checkpoint, device and versions."""
    config, weight = run.module.model.config, run.module.model.embed_tokens.weight
    on_gpu = weight.device.type == "cuda"
    return {
        "checkpoint": str(run.saved.path),
        "step": run.saved.step,
        "attention": config.attention,
        "backend": config.backend,
        "training_length": run.training_length,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(weight.device) if on_gpu else weight.device.type,
        "torch": torch.__version__,
        "chunk_size": reader.chunk_size,
        "full_cache": reader.full_cache,
    }


def table_head(columns: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{table_row(columns)}\n|{' ---: |' * len(columns)}"


def table_row(cells: Iterable[str]) -> str:
    """A further line of it."""
    return f"| {' | '.join(cells)} |"


def percent(share: float | None) -> str:
    """A share in per cent; a dash if there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    """A figure with four places; a dash if there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def cost_cells(cost: Cost) -> list[str]:
    """Those of `COST_COLUMNS`."""
    peak = "–" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**20:,.0f}"
    seconds = (f"{1e6 * cost.prompt_seconds_per_token:.2f}", f"{1e3 * cost.step_seconds:.2f}")
    return [*seconds, f"{cost.cache_bytes / 1024:,.1f}", peak]


def _plain(value: Any) -> Any:
    """The value, with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
