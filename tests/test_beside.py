"""The command and the page of what stands beside our fix, with a part that is made up."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from atpatch_onnx.running.sessions import Progress
from samples.beside.__main__ import main
from samples.beside.part import Figures, Part
from samples.beside.parts import PARTS

asked: list[tuple[str, int]] = []


def _measure(case: str, seed: int, out: Path, fast: bool, progress: Progress) -> dict[str, Any]:
    asked.append((case, seed))
    return {"lost": 0.5}


def _section(figures: Figures) -> str:
    return f"Lost: {sum(found['lost'] for runs in figures.values() for found in runs.values())}."


def _picture(figures: Figures, axes: Axes) -> None:
    axes.bar(list(figures), [len(runs) for runs in figures.values()])


MADE_UP = Part("made-up", "A made-up part", lambda fast: ("vit/one", "vit/two"), _measure, _section, _picture)


def test_what_is_there_is_not_measured_again_and_what_is_missing_is_named(tmp_path: Path) -> None:
    asked.clear()
    command = ["--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    assert main([*command, "--seed", "0"], (MADE_UP,)) == 0
    assert main([*command, "--seed", "0", "--seed", "2", "--case", "vit/two"], (MADE_UP,)) == 0
    assert asked == [("vit/one", 0), ("vit/two", 0), ("vit/two", 2)]
    page = (tmp_path / "docs" / "beside.md").read_text()
    assert "Lost: 1.5." in page
    assert "Not measured yet: vit/one, seed 1; vit/one, seed 2; vit/two, seed 1." in page
    assert (tmp_path / "docs" / "beside" / "made-up.png").is_file()
    assert json.loads((tmp_path / "docs" / "beside.json").read_text())["made-up"]["vit/two"]["2"] == {"lost": 0.5}
    (tmp_path / "docs" / "beside.md").unlink()
    assert main(["--render", "--docs", str(tmp_path / "docs")], (MADE_UP,)) == 0
    assert (tmp_path / "docs" / "beside.md").read_text() == page


def test_parts_have_names_of_their_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
