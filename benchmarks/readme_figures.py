"""Write the figures of README.md from the files in benchmarks/results: `python benchmarks/readme_figures.py`."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures: benchmarks/readme_figures.py -->", "<!-- end of figures -->"


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def machine(result: dict[str, Any]) -> str:
    """Hardware and versions of a result, in words."""
    e = result["environment"]
    return f"{e['cpu']}, {e['threads']} threads, Python {e['python']}, torch {e['torch']}, commit {e['commit']}"


def text_lines() -> list[str]:
    """The default corpus of each Python version."""
    lines = [
        "| corpus: help topics of | bits per byte at start | at end | seconds in all |",
        "| --- | ---: | ---: | ---: |",
    ]
    for version in ("3.11", "3.12", "3.13"):
        (run,) = load(f"train_text_{version}")["runs"]
        lines.append(f"| Python {version} | {run['start']:.2f} | {run['curve'][-1][1]:.3f} | {run['seconds']:.0f} |")
    return lines


def mqar_lines() -> list[str]:
    """Accuracy by seed."""
    runs = load("train_mqar")["runs"]
    steps = [step for step, _ in runs[0]["curve"]]
    lines = [f"| seed | {' | '.join(f'step {step}' for step in steps)} |", "| --- |" + " ---: |" * len(steps)]
    for run in runs:
        cells = " | ".join(f"{100 * value:.2f} %" for _, value in run["curve"])
        lines.append(f"| {run['seed']} | {cells} |")
    return lines


def attention_lines() -> list[str]:
    """Milliseconds and memory by backend and length."""
    lines = ["| | N | forward ms | backward ms | peak MB |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in load("cpu_attention")["rows"]:
        times = [[f"{1e3 * x:.0f}" for x in row[name]] for name in ("forward_s", "backward_s")]
        cells = " | ".join(f"{b} [{a} - {c}]" for a, b, c in times)
        lines.append(f"| `{row['backend']}` | {row['length']} | {cells} | {row['peak_mb'][1]:.0f} |")
    return lines


def figures() -> str:
    """The whole section."""
    mqar, attention, text = load("train_mqar"), load("cpu_attention"), load("train_text_3.11")
    solved = sum(run["curve"][-1][1] >= 0.98 for run in mqar["runs"])
    shape, seconds = attention["shape"], [run["seconds"] for run in mqar["runs"]]
    parts = [
        f"**`make train`**: validation on the last tenth of the text ({machine(text)}; the corpora of the other Python "
        "versions were trained on with the same interpreter, on one thread each).",
        "\n".join(text_lines()),
        f"**`make mqar`**: accuracy on 1,000 unseen examples; {solved} of {len(mqar['runs'])} seeds end at 98 % or "
        f"more, in {min(seconds):.0f} - {max(seconds):.0f} s each, some of them beside other work ({machine(mqar)}).",
        "\n".join(mqar_lines()),
        f"**`make bench`**: `sdpa` is PyTorch's dense causal attention; float32, batch 1, {shape['heads']} query and "
        f"{shape['kv_heads']} KV heads, head dim {shape['head_dim']}, w = {shape['window']}, selection included; "
        f"median [min - max] of separate processes ({machine(attention)}).",
        "\n".join(attention_lines()),
    ]
    return "\n\n".join(parts)


def updated(readme: str) -> str:
    """README with the figures of the result files."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{figures()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
