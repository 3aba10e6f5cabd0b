"""Write the figures of README.md and docs/ from the files in benchmarks/results: `python benchmarks/readme_figures.py`.

In a page, they stand between `<!-- figures: benchmarks/NAME.py -->` and `<!-- end of figures -->`. The function
`tables` in NAME.py makes them from its result files.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from harness import ROOT, Part, load, markdown

BEGIN, END = r"<!-- figures: benchmarks/(\w+)\.py -->", "<!-- end of figures -->"
SECTION = re.compile(rf"^({BEGIN}\n\n).*?(\n\n{END})$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """The pages that may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def parts_of(name: str) -> Iterator[Part]:
    """The parts that go where a marker names this benchmark."""
    module = import_module(name)
    yield from module.tables(*map(load, getattr(module, "RESULTS", [name])))


def updated(page: Path) -> str:
    """The text of a page, with figures from the current result files.

    Raises:
        ValueError: if a marker is malformed or has no end.
    """
    text = page.read_text()
    count, begins, ends = len(SECTION.findall(text)), text.count("<!-- figures:"), text.count(END)
    if not count == begins == ends:
        form = "`<!-- figures: benchmarks/NAME.py -->`, empty line, figures, empty line, `<!-- end of figures -->`"
        raise ValueError(f"{page}: expected {form}, got {begins} begun and {ends} ended, {count} of them in this form")
    return SECTION.sub(lambda found: found[1] + markdown(parts_of(found[2]), page.parent) + found[3], text)


if __name__ == "__main__":
    for page in pages():
        page.write_text(updated(page))
