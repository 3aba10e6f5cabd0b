"""What the retention loss computes for sampled queries: how well contents predict the attention to far keys.

- `terms`: the definition in plain PyTorch, and the same as a custom operation
- `kernels`: the operation's Triton kernels; none of them makes a tensor of all pairs of queries and keys
- `gradient_kernel`: the gradient of contents
"""
