"""Attention over segments.

- `torch_backend`: in plain PyTorch, on any device
- `ops`: attention by Triton kernels, as operations with gradients; `kernels`: the kernels, one file for each pass
- `key_gradients`: the gradients of keys, values and biases for the `flex` backend, as an operation
- `configs`: tiles of the kernels by GPU, head dim and dtype
"""
