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


def test_what_does_not_fit_is_an_error() -> None:
    q, k = torch.zeros(2, 4, 150, 8), torch.zeros(2, 2, 150, 8)
    mask = Lifetimes.causal(150)
    with pytest.raises(ValueError, match=r"lifetimes: expected \[2 or 1, 2 or 1, 150\]"):  # else the process would end
        flex_mask_attention(q, k, k, Lifetimes.top_w(torch.zeros(3, 1, 150), 9))
    with pytest.raises(ValueError, match=r"lifetimes: expected \[2 or 1, 2 or 1, 150\]"):
        flex_mask_attention(q, k, k, Lifetimes.top_w(torch.zeros(2, 4, 150), 9))
    with pytest.raises(ValueError, match="query heads must be a multiple of KV heads, got 4 and 3"):
        flex_mask_attention(q, *[torch.zeros(2, 3, 150, 8)] * 2, mask)
    with pytest.raises(ValueError, match="v: expected"):
        flex_mask_attention(q, k, k[:, :, :9], mask)
    with pytest.raises(ValueError, match="trains on CUDA only"):
        flex_mask_attention(q.requires_grad_(), k, k, mask)
