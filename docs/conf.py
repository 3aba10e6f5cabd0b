"""Settings of Sphinx for `make docs`. The pages are the Markdown files of the repository, where they stand.

Links between them therefore work here and wherever the repository is hosted. README.md is the start page.
"""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import dma_lightning

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "dma-lightning"
author = "The dma-lightning maintainers"
release = version = dma_lightning.__version__

source_suffix = {".md": "markdown", ".ipynb": "markdown"}
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "SECURITY.md", "docs/**"),
    *("benchmarks/NOTES.md", "benchmarks/results/evidence/*/report.md"),
]
exclude_patterns = [".*", "**/.ipynb_checkpoints", "build", "runs", "docs/contents.md"]
nitpicky = True  # a name of ours that is not in the API reference is an error
nitpick_ignore_regex = [
    ("py:.*", r"(?!dma_).*"),  # names of other projects
    # types that users do not make
    ("py:.*", r"dma_.*\.(Cache|Copies|DecoderCache|Drift\w+|DynamicMaskConfig|SavedRun|Shard)"),
]

myst_enable_extensions = ["html_image"]  # for the width of pictures
myst_heading_anchors = 3
default_role = "code"  # docstrings write code between single backticks, as Markdown does
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "dma-lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

CONTENTS = Path(__file__).with_name("contents.md")


def add_contents(app: "Sphinx", page: str, source: list[str]) -> None:
    """Give the start page the table of contents, which the sidebar shows."""
    if page == root_doc:
        source[0] += "\n" + CONTENTS.read_text()


def notebook_to_markdown(app: "Sphinx", page: str, source: list[str]) -> None:
    """Make the Markdown of a notebook's cells, with a link to the file. Notebooks are stored without outputs."""
    path = app.env.doc2path(page)
    if path.suffix != ".ipynb":
        return
    parts = []
    for cell in json.loads(source[0])["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.insert(1, f"{{download}}`Download this page as a notebook <{path.name}>`")
    source[0] = "\n\n".join(parts)


def mark_letters(app: "Sphinx", what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Make code of `length: N.`, which would otherwise begin a numbered list."""
    lines[:] = [re.sub(r"^( +\w+: )([A-Z])\.", r"\1`\2`.", line) for line in lines]


def copy_start_page(app: "Sphinx", failure: Exception | None) -> None:
    """Make the start page the index of its folder."""
    if failure is None and app.builder.name == "html":
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: "Sphinx") -> None:
    """Register the functions above."""
    app.connect("source-read", add_contents)
    app.connect("source-read", notebook_to_markdown)
    app.connect("autodoc-process-docstring", mark_letters, priority=400)  # before napoleon
    app.connect("build-finished", copy_start_page)
