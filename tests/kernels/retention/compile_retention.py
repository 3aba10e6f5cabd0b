"""Compile the kernels of the retention loss for Hopper without a GPU: `python compile_retention.py DTYPE,HEAD_DIM`.

Prints JSON: for each kernel, bytes of shared memory, and bytes of local memory of a thread, for spilled registers.
"""

import json
import sys
from typing import Any

import torch
import triton
from spills import stack_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dma_kernels.retention import gradient_kernel, kernels
from dma_kernels.retention.inputs import TermInputs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {"p_drift": "*fp64", "p_positions": "*i64", "p_runs": "*i32"}  # all others are float32
OF_KEYS = ("p_q", "p_k", "p_v", "p_mean")
STRIDES = ("k_b", "k_g", "k_n", "v_b", "v_g", "v_n")


def compiled(kernel: Any, dtype: str, constants: dict[str, Any]) -> Any:
    """One kernel with the constants that it takes."""
    names = kernel.arg_names
    constants = {name: x for name, x in constants.items() if name in names}
    types = {name: POINTERS.get(name, "*fp32") if name.startswith("p_") else "i32" for name in names}
    types |= {name: f"*{dtype}" for name in OF_KEYS if name in names} | dict.fromkeys(constants, "constexpr")
    types |= {"scale": "fp32"} if "scale" in names else {}
    aligned = [name for name in names if name.startswith("p_") or name in STRIDES]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels.OPTIONS)


def main(asked: str) -> None:
    """Compile all kernels and print what they need."""
    dtype, head_dim = asked.split(",")
    q = torch.empty(1, 1, 64, int(head_dim), dtype=DTYPES[dtype], device="meta")
    inputs = TermInputs(q, q, q, q, None, q, None, 1)
    forward, gradient = kernels.constants(inputs) | {"PART": 256}, kernels.constants(inputs, gradient=True)
    results = {}
    for name, kernel, constants in (
        ("sum_values", kernels._sum_values_kernel, forward),
        ("mean_values", kernels._mean_values_kernel, forward | {"P": 32}),
        ("sum_terms", kernels._sum_terms_kernel, forward),
        ("join_terms", kernels._join_terms_kernel, {"M": 16, "P": 64}),
        ("content_gradient", gradient_kernel._content_gradient_kernel, gradient),
    ):
        done = compiled(kernel, dtype, constants)
        results[name] = {"shared": done.metadata.shared, "stack": stack_of(done.asm["cubin"])}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
