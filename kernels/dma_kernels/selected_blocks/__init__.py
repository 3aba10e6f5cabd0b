"""The selected branch of native sparse attention (NSA): attention to the blocks that each query has chosen."""
