"""The Triton kernels of attention over segments: forward, and the gradients of queries and of keys."""
