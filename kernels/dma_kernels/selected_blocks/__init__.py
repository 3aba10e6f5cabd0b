"""Native sparse attention (NSA): which blocks each query chooses, and attention to them, the selected branch."""
