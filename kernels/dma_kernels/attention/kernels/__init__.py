"""The Triton kernels of attention over segments: the forward pass, and the gradients of keys and of queries."""
