"""From lifetimes to dense lists of keys.

- `slots`: `SegmentSlots`, which key stands in which slot of which segment, and when it is seen there
- `plain`: what fills the slots, in plain PyTorch; `slot_kernels`: the same on CUDA
- `gather`: rows into their slots, and the sum over the copies back; by `gather_kernels` on CUDA
"""
