"""Large tiles for attention kernels under Triton's interpreter, where each operation takes milliseconds at any size."""

import pytest

from dma_kernels.attention.configs import KernelConfig


def enlarge_attention_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all attention kernels use tiles of 128 rows and 128 columns."""
    for kernel in ("forward", "query_gradients", "key_gradients"):
        monkeypatch.setattr(
            f"dma_kernels.attention.kernels.{kernel}.kernel_config", lambda *_: KernelConfig(128, 128, 4, 1)
        )
