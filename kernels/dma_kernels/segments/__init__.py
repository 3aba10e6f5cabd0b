"""From lifetimes to dense lists of keys: segments, what stands in their slots, and the copies there and back."""
