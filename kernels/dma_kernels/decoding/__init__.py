"""Attention token by token: the exact cache of constant size, a cache of all keys, and the step as one kernel."""
