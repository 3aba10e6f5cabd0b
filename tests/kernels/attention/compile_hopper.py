"""Compile the forward kernel for Hopper without a GPU: `python compile_hopper.py DTYPE,HEAD_DIM,GROUP ...`.

Prints one line of JSON for each argument.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from dma_kernels.attention.kernels import hopper_forward as module

SIZES = ("items", "tiles", "kv_heads", "mask_heads", "segments", "segment", "snapshot", "keys", "length")
DIVISIBLE = ("p_lse", "p_count", "segment", "snapshot", "keys", "length")


def described(dtype: str, block: tuple[int, ...], layout: gl.NVMMASharedLayout | None = None) -> str:
    """The type of a tensor descriptor, as Triton writes it."""
    layout = layout or gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return f"tensordesc<{dtype}{list(block)},{layout!r}>"


def compiled(dtype: str, head_dim: int, group: int) -> object:
    """The kernel for one dtype (`bf16` or `fp16`), head dim and group."""
    block_k = module.BLOCK_K
    query, slots = described(dtype, (1, group, 64 // group, head_dim)), described(dtype, (block_k, head_dim))
    lines = {x: described(x, (1, block_k), module._LINES) for x in ("fp32", "i32")}
    types = {"d_q": query, "d_k": slots, "d_v": slots, "d_bias": lines["fp32"], "d_birth": lines["i32"]}
    types |= {"d_death": lines["i32"], "d_out": query, "p_lse": "*fp32", "p_count": "*i32"}
    types |= dict.fromkeys(SIZES, "i32") | {"scale": "fp32"}
    constants = {"BLOCK_K": block_k, "D": head_dim, "R": group, "STAGES": module._STAGES[head_dim]}
    names = list(types)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in DIVISIBLE}
    types |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(module._forward_kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        dtype, head_dim, group = asked.split(",")
        kernel = compiled(dtype, int(head_dim), int(group))
        shared, products = kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async")
        print(json.dumps({"shared": shared, "products": products, "bytes": len(kernel.kernel)}))
