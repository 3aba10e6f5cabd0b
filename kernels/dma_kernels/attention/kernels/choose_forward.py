"""Chooses the kernel of the forward pass: the one for Hopper if it can run, and otherwise the one for all GPUs.

B batch, H query heads, G KV heads, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

import functools
import logging
import os
from types import ModuleType

import triton
from torch import Tensor

from dma_kernels.attention.kernels.common import aligned
from dma_kernels.attention.kernels.forward import launch_forward

_RAN_ON = ("3.6",)  # versions of Triton on which the kernel has run; each version may change Gluon
_VARIABLE = "DMA_KERNEL_GLUON"


def launch_chosen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    *,
    base_2: Tensor,
    scale: float,
    segment_length: int,
) -> tuple[Tensor, Tensor]:
    """`launch_forward`, with the kernel for Hopper if that supports this GPU, dtype and shape, and can be imported.

    `base_2` holds the biases times log2(e), as the kernel for Hopper takes them. The environment variable
    `DMA_KERNEL_GLUON=0` turns that kernel off.
    """
    hopper = None if os.environ.get(_VARIABLE) == "0" or not q.is_cuda else hopper_forward()
    group, keys = q.shape[1] // k.shape[1], k.shape[2]
    if hopper is not None and hopper.can_take(q, group, segment_length, keys):
        launch, q, bias = hopper.launch_hopper_forward, aligned(q), base_2
    else:
        launch = launch_forward
    return launch(q, k, v, bias, birth, death, scale=scale, segment_length=segment_length)


@functools.cache
def hopper_forward() -> ModuleType | None:
    """The module of the kernel for Hopper. If this version of Triton cannot run it, None, and the log says why."""
    if ".".join(triton.__version__.split(".")[:2]) not in _RAN_ON:
        why = f"it has run only on Triton {', '.join(_RAN_ON)}, got {triton.__version__}"
    else:
        try:
            from dma_kernels.attention.kernels import hopper_forward
        except (ImportError, AttributeError) as error:
            why = str(error)
        else:
            return hopper_forward
    logging.getLogger(__name__).info("the forward kernel for Hopper, in Gluon, is not used: %s", why)
    return None
