"""Compile the kernel that chooses blocks for Hopper, without a GPU.

`python compile_choice.py DTYPE HEAD_DIM GROUP` prints JSON. The blocks are those of the NSA paper.
"""

import json
import sys

import torch
import triton
from spills import stack_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dma_kernels.selected_blocks import choice_kernels as module
from dma_kernels.selected_blocks.grid import BlockSizes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STRIDES = ("q_b", "q_h", "q_n", "k_b", "k_g", "k_n")
POINTERS = {"p_run": "*i32", "p_first": "*i32", "p_block_run": "*i32", "p_out": "*i64"}


def compiled(dtype: str, head_dim: int, group: int, sizes: BlockSizes) -> object:
    """The kernel for one dtype, head dim and group."""
    q = torch.empty(1, group, 1, head_dim, dtype=DTYPES[dtype], device="meta")
    types = dict.fromkeys(("p_q", "p_k"), f"*{dtype}") | POINTERS | dict.fromkeys((*STRIDES, *module._SIZES), "i32")
    types |= {"scale": "fp32"}
    constants = module._constants(q, group, sizes, sizes.select_count)
    names = module._best_blocks_kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = ("p_q", "p_k", *POINTERS, *STRIDES)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(module._best_blocks_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=module._OPTIONS)


if __name__ == "__main__":
    kernel = compiled(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), BlockSizes(32, 16, 64, 16))
    products = kernel.asm["ptx"].count("wgmma.mma_async")
    found = {"shared": kernel.metadata.shared, "products": products, "stack": stack_of(kernel.asm["cubin"])}
    print(json.dumps(found))
