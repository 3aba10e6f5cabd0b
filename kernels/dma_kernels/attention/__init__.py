"""Attention over segments: in plain PyTorch, and as operations of Triton kernels with their gradients."""
