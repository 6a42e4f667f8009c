"""What README says of results is what was measured."""

import json
from pathlib import Path

from samples.readme import with_table

ROOT = Path(__file__).parent.parent


def test_the_table_of_results_is_rendered_from_the_figures():
    document = json.loads((ROOT / "docs" / "evidence" / "results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme, document) == readme, "run python -m samples.readme"
