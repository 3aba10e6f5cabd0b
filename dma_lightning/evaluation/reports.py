"""The output of a command: tables, and a file."""

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
    """A path where a new file can be written, checked before the work begins.

    Raises:
        ValueError: if the file exists, or its folder does not.
    """
    if output is None:
        return None
    output = user_path(output)
    if output.exists():
        raise ValueError(f"output: expected no such file, since nothing is overwritten, got {output}; name another")
    if not output.parent.is_dir():
        raise ValueError(f"output: expected a file in an existing folder, got {output}; create the folder")
    return output


def write_report(output: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; NaN and infinities become null."""
    with atomic_write(output) as file:
        file.write(json.dumps(_plain(content), indent=1, allow_nan=False).encode())


def facts(run: TrainedRun, reader: Reader) -> dict[str, Any]:
    """The facts that the results depend on: checkpoint, device and versions."""
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
    """One more row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def percent(share: float | None) -> str:
    """A share in percent; a dash if there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    """A number with four decimals; a dash if there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def cost_cells(cost: Cost) -> list[str]:
    """The cells for `COST_COLUMNS`."""
    peak = "–" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**20:,.0f}"
    seconds = (f"{1e6 * cost.prompt_seconds_per_token:.2f}", f"{1e3 * cost.step_seconds:.2f}")
    return [*seconds, f"{cost.cache_bytes / 1024:,.1f}", peak]


def _plain(value: Any) -> Any:
    """The value, with None in place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
