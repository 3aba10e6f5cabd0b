"""Native sparse attention whose blocks are chosen by the Triton kernel."""

import pytest
import torch
from torch import Tensor

from dma_kernels.selected_blocks import choice
from dma_kernels.selected_blocks.grid import BlockSizes, Seen
from dma_lightning import NativeSparseAttention


def make_module(**options: int) -> NativeSparseAttention:
    sizes = {"compress_block": 8, "compress_stride": 4, "compress_hidden": 12, "select_block": 16, "select_count": 4}
    module = NativeSparseAttention(
        hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8, nsa_window=5, backend="torch",
        **{f"nsa_{name}": size for name, size in (sizes | options).items()},
    )  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return module


def test_it_gives_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With documents and padding; on a CPU, the kernel runs under Triton's interpreter."""
    pytest.importorskip("triton")
    from dma_kernels.selected_blocks.choice_kernels import launch_best_blocks

    launched = []

    def launch(q: Tensor, k: Tensor, run: Tensor, first: Tensor, block_run: Tensor, *sizes: int) -> Tensor:
        launched.append(launch_best_blocks(q, k, Seen(run, first, block_run), BlockSizes(*sizes)))
        return launched[-1]

    monkeypatch.setattr(choice, "best_blocks", launch)
    module, x = make_module().to(device), torch.randn(2, 110, 24, device=device)
    documents = (torch.arange(110, device=device) >= 27).long().expand(2, -1)
    padding = torch.zeros(2, 110, dtype=torch.bool, device=device)
    padding[1, :9] = True
    results = []
    for backend in ("torch", "triton"):
        module.backend = backend
        out = module(x, documents, padding)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*module.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert [x.shape for x in launched] == [(2, 2, 110, 4)]


@pytest.mark.parametrize(
    ("backend", "said"),
    [("torch", "plain PyTorch"), ("triton", "Triton kernels, chosen in plain PyTorch")],
)
def test_what_the_kernel_does_not_take_is_chosen_in_plain_pytorch(
    backend: str, said: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    module, x = make_module().to(device), torch.randn(1, 70, 24, device=device)
    module.backend = backend
    out = module(x)
    assert ", chosen" not in module.computed_by(x.device, x.dtype)
    monkeypatch.setattr(choice, "MAX_CHOSEN", 3)
    assert module.computed_by(x.device, x.dtype).endswith(f"selected blocks by {said}")
    torch.testing.assert_close(module(x), out, rtol=1e-3, atol=1e-3)
