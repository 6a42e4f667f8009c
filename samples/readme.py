"""The table of results in README.md, from docs/evidence/results.json.

python -m samples.readme          # writes it between its two marks; `samples.results` does, too
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samples.bounds import FIGURES
from samples.page_tables import named, table
from samples.summary import spread

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: python -m samples.readme -->", "<!-- end of results -->"

BACKDOORS = (
    ("ViT, fixed patch", "measured vit/badnets-fixed"),
    ("ViT, random place", "measured vit/badnets-random"),
    ("ViT, Trojan", "measured vit/trojan"),
    ("ViT, fixed patch, trigger inverted", "inverted vit/badnets-fixed"),
    ("ViT, blended over the whole image", "measured vit/blended"),
    ("DeiT, fixed patch", "measured deit/badnets-fixed"),
    ("DeiT, random place", "measured deit/badnets-random"),
    ("MiniLM, rare word", "measured minilm/token"),
    ("MiniLM, phrase", "measured minilm/phrase"),
    ("MiniLM, rare word, inverted", "inverted minilm/token"),
)
TABLES = (
    ("Adult: sex", "measured adult/sex"),
    ("Adult: race", "measured adult/race"),
    ("Adult: age", "measured adult/age"),
    ("German credit: sex", "measured german/sex"),
    ("German credit: age", "measured german/age"),
    ("COMPAS: sex", "measured compas/sex"),
    ("COMPAS: race", "measured compas/race"),
    ("COMPAS: age", "measured compas/age"),
)

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def render(document: Mapping[str, Any]) -> str:
    """The tables: of backdoors and of protected attributes; what was not measured has no row."""
    runs: Runs = document["runs"]

    def mean(key: str, figure: str, scale: str = "{:.2%}") -> str:
        found = spread(runs[key], FIGURES[figure])
        return "-" if found is None else scale.format(found.mean)

    def lost(key: str) -> str:
        return mean(key, "accuracy lost", "{:+.2%}").replace("%", " points")

    backdoors = [
        [
            name,
            mean(key, "ASR"),
            mean(key, "ASR above floor"),
            lost(key),
            f"{mean(key, 'robust accuracy')} ({mean(key, 'robust accuracy of the twin')})",
        ]
        for name, key in BACKDOORS
        if key in runs
    ]
    tables = [[name, mean(key, "UF"), mean(key, "UF, patched"), lost(key)] for name, key in TABLES if key in runs]
    return "\n\n".join(
        [
            f"Measured with {named(document['seeds'])}, on inputs that no fit saw. ASR is counted above the floor; the"
            " paper has it at 97.9 % and 0.46-0.70 %, UF at 0.04 %, and 0.1 points of accuracy lost.",
            table(("backdoor", "ASR", "patched, above floor", "accuracy lost", "robust accuracy (twin's)"), backdoors),
            table(("protected attribute", "UF", "patched", "accuracy lost"), tables),
        ]
    )


def with_table(readme: str, document: Mapping[str, Any]) -> str:
    """The text with the tables between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{render(document)}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the tables into README.md."""
    document = json.loads((ROOT / "docs" / "evidence" / "results.json").read_text())
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
