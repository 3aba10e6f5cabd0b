"""Attention over segments.

- `torch_backend`: in plain PyTorch, on any device
- `ops`: by Triton kernels, as operations with gradients; `kernels`: the kernels, one pass a file
- `key_gradients`: what FlexAttention's backward leaves out, as an operation
- `configs`: tiles of the kernels by GPU, head dim and dtype
"""
