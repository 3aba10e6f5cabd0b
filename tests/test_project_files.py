"""Files that are read by external services agree with the project."""

import re
from importlib.metadata import version
from pathlib import Path

import yaml

import dma_lightning

ROOT = Path(__file__).parents[1]


def test_there_is_one_version() -> None:
    assert version("dma-lightning") == dma_lightning.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dma_lightning.__version__


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
    runs = {step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step}
    assert runs == set(re.findall(r"make \w+", (ROOT / ".ci/run").read_text()))
