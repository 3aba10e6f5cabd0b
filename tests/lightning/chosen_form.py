"""The form that docs/mechanism.md chooses: gates, and contents that only affect ranks and have a loss of their own."""

CHOSEN: dict[str, object] = {
    "drift": "gate", "score_form": "linear", "content": "input", "content_in_bias": False, "retention_weight": 0.1,
    "retention_target": "output", "keep_last": 2,
}  # fmt: skip
