"""What README says of results is what was measured, and it says what a stranger asks first."""

import re
from pathlib import Path

from samples.readme import ROWS, documents, render, with_table

README = Path(__file__).parent.parent / "README.md"
FIGURE = re.compile(r"\d+\.\d+ ?%|\d+\.\d+ points")


def test_the_table_of_results_is_rendered_from_the_figures():
    readme = README.read_text()
    assert with_table(readme, *documents()) == readme, "run python -m samples.readme"
    assert len(ROWS) == 6


def test_what_was_not_measured_is_said():
    rows = render({"seeds": [0, 1], "runs": {}}, {"runs": {}}).splitlines()[-6:]
    assert rows[0] == (
        "| ViT, a square in a fixed place | not measured | 0.46 to 0.70 % | - | **not measured** | not measured |"
    )
    assert all(row.count("not measured") == 3 for row in rows)


def test_figures_stand_in_the_table_alone():
    before, rest = README.read_text().split("<!-- results")
    assert not FIGURE.findall(before + rest.split("<!-- end of results -->")[1])


def test_it_is_short_and_begins_with_how_to_start():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    screen = "\n".join(lines[:45])
    for said in ("demo.png", "make demo", "make test", "pip install", "```python"):
        assert said in screen


def test_the_example_is_twelve_lines():
    code = README.read_text().split("```python\n")[1].split("```")[0]
    assert sum(bool(line.strip()) for line in code.splitlines()) == 12
