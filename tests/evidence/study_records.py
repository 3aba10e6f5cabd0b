"""Made-up records of trainings."""

from benchmarks.evidence.results import Record

ENVIRONMENT: dict[str, str | int] = {"cpu": "none", "cores": 1, "python": "3", "torch": "2", "commit": "0"}


MODEL = {"keep_window_size": 6, "keep_last": 2, "sinks": 0, "sliding_window": 64, "num_hidden_layers": 3}
DIGEST = "4f53cda18c2baa0c"  # of no configurations


def record(form: str, seed: int, value: float, lr: float = 0.1, **more: object) -> Record:
    """A record of a training whose accuracy reaches a value in two steps."""
    fields: dict[str, object] = {
        "options": {"model.lr": lr, "seed_everything": seed, "model.attention": form}, "configs": DIGEST,
        "model": MODEL | {"attention": form}, "data": {"sequence_length": 16}, "parameters": 1000,
        "flops_per_token": 6000.0, "steps": 2, "tokens": 64, "curves": {"val/accuracy": [(1, value / 2), (2, value)]},
        "last": {}, "evaluations": {}, "seconds": 1.0, "environment": ENVIRONMENT,
    }  # fmt: skip
    return Record("recall", "small", form, lr, seed, **(fields | more))
