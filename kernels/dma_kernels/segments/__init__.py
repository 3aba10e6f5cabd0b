"""From lifetimes to dense lists of keys.

- `slots`: `SegmentSlots`, which key is in which slot of which segment, and which queries see it there
- `fill_slots`: what fills the slots, in plain PyTorch; `slot_kernels`: the same on CUDA
- `gather`: rows into their slots, and the sum over the copies back; `biases`: biases into their slots; on CUDA, both by
  `gather_kernels` and `sum_kernels`
"""
