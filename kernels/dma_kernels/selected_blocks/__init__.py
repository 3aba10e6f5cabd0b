"""NSA's selected branch: attention to the blocks that each query has chosen."""
