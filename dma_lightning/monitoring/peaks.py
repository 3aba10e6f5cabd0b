"""The peak FLOP/s of a device, the denominator of model FLOP/s utilization."""

import time
from functools import cache

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops

# Dense TFLOP/s from data sheets, for GPUs where Lightning has none or has those with 2:4 sparsity, twice as high.
_DENSE: dict[str, dict[torch.dtype, float]] = {
    "b200": {torch.bfloat16: 2250, torch.float16: 2250, torch.float32: 75, torch.float64: 37},
    "h200 nvl": {torch.bfloat16: 835, torch.float16: 835, torch.float32: 60, torch.float64: 30},
    "h200": {torch.bfloat16: 989, torch.float16: 989, torch.float32: 67, torch.float64: 34},
    "h100 nvl": {torch.bfloat16: 835, torch.float16: 835, torch.float32: 60, torch.float64: 30},
}
_TENSOR_FLOAT_32 = {"b200": 1125, "h200 nvl": 417, "h200": 494, "h100 nvl": 417}


def compute_dtype(trainer: pl.Trainer) -> torch.dtype:
    """The dtype of matrix products under the trainer's precision."""
    prefixes = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return prefixes.get(str(trainer.precision).split("-")[0], torch.float32)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of a device in a dtype, and where the figure comes from.

    The figure is from the data sheet, without sparsity; if none is listed (as for a CPU), it is measured.
    """
    listed = _listed(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    if listed is None and device.type == "cuda":
        listed = get_available_flops(device, dtype)
    if listed is not None:
        return float(listed), f"data sheet of {torch.cuda.get_device_name(device)}, dense"
    return _measured(device, dtype), "fastest of a few matrix products, measured"


def _listed(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU, by its name in the driver."""
    for chip, teraflops in _DENSE.items():
        if set(chip.split()) <= set(name.lower().split()):
            if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
                return _TENSOR_FLOAT_32[chip] * 1e12
            return teraflops[dtype] * 1e12
    return None


@cache
def _measured(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 1024
    x = torch.ones(size, size, device=device, dtype=dtype)  # not random, so that the run's random numbers do not change
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work; on a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
