"""Which keys live, and until when.

- `deaths`: when the causal top-w drops each key, in plain PyTorch, by two parallel steps over segments
- `ops`: the same as one operation for torch.compile; on CUDA it runs `kernels`, which give the same integers
"""
