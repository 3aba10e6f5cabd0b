"""Attention token by token.

- `state`: what a cache holds, and what arrives at it
- `dynamic_cache`: the exact cache of constant size, in plain PyTorch; `full_cache`: a cache of all keys, its oracle
- `attention`: attention of new queries to the keys of a cache
- `step`: one token as an operation; `kernels`: the same as one kernel
"""
