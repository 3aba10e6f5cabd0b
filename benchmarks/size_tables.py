"""Write the tables of docs/attention.md: `python benchmarks/size_tables.py`."""

from pathlib import Path

from dma_lightning.cli.sizes import size_lines

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "attention.md"
BEGIN, END = "<!-- sizes: benchmarks/size_tables.py -->", "<!-- end of sizes -->"
NAMES = ("1m", "5m", "20m", "80m", "200m", "680m", "1.7b")


def updated(page: str) -> str:
    """The page with the tables of all shapes."""
    tables = ["\n".join(size_lines(ROOT / "configs" / "model" / f"{name}.yaml", 4096)) for name in NAMES]
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n" + "\n\n".join(tables) + f"\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
