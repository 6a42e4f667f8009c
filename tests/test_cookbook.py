"""The notebooks run, cell by cell, as they stand."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BOOK = sorted((Path(__file__).parent.parent / "docs" / "cookbook").glob("*.ipynb"))
DEMO = ("security", "platform")
"""Notebooks of the demo's files."""


def cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def marked(notebook: Path):
    group = "demo" if notebook.stem in DEMO else f"cookbook-{notebook.stem}"
    return pytest.param(notebook, marks=[pytest.mark.nightly, pytest.mark.xdist_group(group)], id=notebook.stem)


@pytest.mark.parametrize("notebook", [marked(notebook) for notebook in BOOK])
def test_a_notebook_runs(notebook, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if notebook.stem in DEMO:
        (tmp_path / "demo-out").symlink_to(request.getfixturevalue("demo"))
    module = ModuleType(notebook.stem)  # one that torch finds again while it exports a model of the notebook
    monkeypatch.setitem(sys.modules, notebook.stem, module)
    for number, cell in enumerate(cells(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), module.__dict__)


@pytest.mark.parametrize("notebook", BOOK, ids=lambda notebook: notebook.stem)
def test_what_a_notebook_shows_is_kept(notebook):
    """The site shows it: `make docs` runs nothing."""
    shown = [output for cell in cells(notebook) for output in cell["outputs"]]
    assert shown
    assert not [output for output in shown if output["output_type"] == "error"]
    assert not [output for output in shown if output.get("name") == "stderr"]
