"""Which keys live, and until when.

- `plain`: the order of keys and the causal top-w in plain PyTorch, in two parallel steps over segments
- `ops`: the same as one operation for torch.compile; by `kernels` on CUDA, which give the same integers
"""
