"""From lifetimes to dense lists of keys.

- `plain`: `SegmentLayout`, which key stands in which slot of which segment, in plain PyTorch
- `slots`: `SegmentSlots`, the same as one operation for torch.compile; by `slot_kernels` on CUDA
- `gather`: rows into their slots, and the sum over the copies back; by `gather_kernels` on CUDA
"""
