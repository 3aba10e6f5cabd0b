"""FlexAttention in natural order equals the definition over the same lifetimes."""

import pytest
import torch

from dma_flex import Lifetimes, flex_mask_attention
from dma_kernels import reference_attention

ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("kind", ["documents", "padding", "heads"])
def test_equals_the_definition(kind: str, device: str) -> None:
    length, position = 300, torch.arange(300, device=device)
    q, k, v = (torch.randn(2, heads, length, 32, device=device, requires_grad=ON_GPU) for heads in (4, 2, 2))
    mask = {
        "documents": lambda: Lifetimes.causal(length, documents=(position // 110).expand(2, -1)),
        "padding": lambda: Lifetimes.causal(length, padding=(position < 40).expand(2, -1)),  # queries without keys
        "heads": lambda: Lifetimes.top_w(torch.randn(2, 2, length, device=device), 70),
    }[kind]()
    out = flex_mask_attention(q, k, v, mask, scale=0.3)
    expected = reference_attention(q, k, v, torch.zeros(2, 2, length, device=device), mask.to_dense(), scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    if ON_GPU:  # FlexAttention has no backward on a CPU
        grad = torch.randn_like(out)
        found, exact = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-3)
