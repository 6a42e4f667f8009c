"""The table of results in README.md, from docs/evidence/results.json and docs/evidence/neuron_edits.json.

python -m samples.readme          # writes it between its two marks; `make results` and `make comparison` come before
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samples.bounds import FIGURES
from samples.compared_page import best_edit
from samples.page_tables import named, table
from samples.summary import spread

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "evidence"
BEGIN, END = "<!-- results: python -m samples.readme -->", "<!-- end of results -->"

ROWS = (
    ("ViT, a square in a fixed place", "vit/badnets-fixed"),
    ("ViT, a square anywhere", "vit/badnets-random"),
    ("ViT, blended over the whole image", "vit/blended"),
    ("MiniLM, a rare word", "minilm/token"),
    ("Adult, leans on sex", "adult/sex"),
    ("COMPAS, leans on race", "compas/race"),
)
"""What a row is called, and its case."""

PAPER = {"backdoor": "0.46 to 0.70 %", "attribute": "0.04 %"}
"""What is left by the AtPatch of the paper (ICSE 2026) on its tasks of this kind, on average."""

HEADER = ("", "before", "AtPatch, paper", "best neuron edit, here", "AtPatch, here", "accuracy lost")

Document = Mapping[str, Any]


def render(results: Document, comparison: Document) -> str:
    """The table: what is left of each problem; a case that was not measured says so."""
    return "\n\n".join([_head(results), table(HEADER, [_row(*row, results, comparison) for row in ROWS])])


def _head(results: Document) -> str:
    return (
        f"What is left, on inputs that no fit saw, measured with {named(results['seeds'])}. Of backdoors: the attack's"
        " success rate (97.9 % before the fix in the paper), after it above the share that the base sends to the target"
        " anyway. Of protected attributes: the share of predictions that flip when it alone is changed. The paper's"
        " figures are averages over its own tasks. Neuron edits (IDNN, CARE) act on every input, and are measured on"
        " bases that were trained apart."
    )


def _row(name: str, case: str, results: Document, comparison: Document) -> Sequence[str]:
    runs = results["runs"].get(f"measured {case}", [])
    backdoor = case.startswith(("vit", "deit", "minilm"))
    before, after = ("ASR", "ASR above floor") if backdoor else ("UF", "UF, patched")

    def mean(figure: str, scale: str = "{:.2%}") -> str:
        found = spread(runs, FIGURES[figure]) if runs else None
        return "not measured" if found is None else scale.format(found.mean)

    edit = best_edit(comparison["runs"].get(case, []))
    return (
        name,
        mean(before),
        PAPER["backdoor" if backdoor else "attribute"],
        "-" if edit is None else f"{edit[1]:.2%} ({edit[0]})",
        f"**{mean(after)}**",
        mean("accuracy lost", "{:+z.2%}").replace("%", " points"),
    )


def with_table(readme: str, results: Document, comparison: Document) -> str:
    """The text with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{render(results, comparison)}\n\n{END}{rest.split(END)[1]}"


def documents() -> tuple[Document, Document]:
    """The figures that the table is of."""
    results, comparison = (json.loads((EVIDENCE / f"{name}.json").read_text()) for name in ("results", "neuron_edits"))
    return results, comparison


def main() -> int:
    """Write the table into README.md."""
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), *documents()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
