"""Attention token by token.

- `state`: the tensors of a cache, and the new keys that it takes
- `dynamic_cache`: the exact cache of constant size; `full_cache`: a cache of all keys, its oracle
- `attention`: attention of new queries to the keys of a cache
- `step`: one token, in plain PyTorch and as an operation; `kernels`: the same as one Triton kernel
"""
