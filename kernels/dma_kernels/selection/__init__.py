"""Which keys live, and until when: in plain PyTorch, and by Triton kernels that give the same integers."""
