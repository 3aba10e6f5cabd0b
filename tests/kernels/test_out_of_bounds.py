"""No kernel accesses memory out of bounds: attention, choice of blocks and small models, under compute-sanitizer."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

ATTENTION = """
import torch
from dma_kernels import Lifetimes, fused_attention
from dma_kernels.selected_blocks.choice import choose_blocks
from dma_kernels.selected_blocks.grid import BlockSizes, Seen

torch.manual_seed(0)
for length, window, group, head_dim in ((300, 40, 2, 64), (257, 1000, 1, 40), (1, 1, 4, 128)):
    shapes = [(2, length, 2 * group, head_dim), *[(2, length, 2, head_dim)] * 2]
    qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
    inputs = [x.requires_grad_() for x in (*qkv, torch.randn(2, length, 2, device="cuda").transpose(1, 2))]
    documents = torch.arange(length, device="cuda").expand(2, -1) // 100
    padding = torch.rand(2, length, device="cuda") < 0.1
    mask = Lifetimes.top_w(inputs[3], window, documents=documents, padding=padding, keep_last=2, sinks=1)
    out = fused_attention(*inputs, mask)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    torch.cuda.synchronize()
for length, heads in ((301, 6), (301, 2), (9, 4)):
    sizes = BlockSizes(16, 8, 16, 5)
    q = torch.randn(2, heads, length, 40, device="cuda", dtype=torch.bfloat16)
    run = torch.zeros(2, length, dtype=torch.int64, device="cuda")
    blocks = sizes.compressed(length)
    choose_blocks(q, q[:, :2, :blocks].clone(), Seen(run, run, run[:, :blocks]), sizes)
    torch.cuda.synchronize()
print("finished")
"""
MODEL = """
import torch
from dma_lightning import DogeForCausalLM, ModelConfig
from dma_lightning.generation import generate

torch.manual_seed(0)
config = ModelConfig(
    vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, attention="dma", keep_window_size=40, keep_last=2, drift="gate",
    score_form="linear", content="input", content_in_bias=False, retention_weight=0.1, retention_target="output",
    backend="triton", max_position_embeddings=512,
)
model = DogeForCausalLM(config).to("cuda", torch.bfloat16)
for length in (300, 1):
    tokens = torch.randint(50, (2, length), device="cuda")
    documents = torch.arange(length, device="cuda").expand(2, -1) // 100
    model(tokens, documents=documents).float().logsumexp(-1).sum().backward()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
    torch.cuda.synchronize()
generate(model.eval(), tokens, 5)
torch.cuda.synchronize()
print("finished")
"""
PLANTED = """
import torch, triton, triton.language as tl

@triton.jit
def write(p_x):
    tl.store(p_x + (1 << 30), 1)

write[(1,)](torch.zeros(4, dtype=torch.int32, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
@pytest.mark.parametrize("code", [ATTENTION, MODEL, PLANTED], ids=["attention", "model", "planted"])
def test_out_of_bounds(code: str, tmp_path: os.PathLike) -> None:
    planted, script = code == PLANTED, tmp_path / "script.py"
    script.write_text(code)  # a file: Triton reads the source of kernels
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if "Device not supported" in ran.stdout + ran.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert (ran.returncode == 9) == planted, (ran.stdout + ran.stderr)[-4000:]
    assert ("finished" in ran.stdout) == (not planted)
