"""`beside.md`, `beside.json` and a picture for each part, from the files of figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from samples.beside.part import Figures, Part
from samples.case import folder_of

HEAD = """# Beside what people would pick instead, and against attackers who know

Written by `python -m samples.beside`; `--render` writes this page from its figures again, which are in
[beside.json](beside.json). Same bases, same untouched evaluation parts. Intervals are of 95 %. The strength of every
attack on the base stands first: a weak attack is no evidence."""


def file_of(out: Path, part: Part, case: str, seed: int) -> Path:
    """Where the figures of a part, case and seed are."""
    return folder_of(out / "beside" / part.name, case, seed).with_suffix(".json")


def gathered(out: Path, parts: Sequence[Part], *, fast: bool) -> dict[str, Figures]:
    """All that was measured, by part."""
    found: dict[str, Figures] = {}
    for part in parts:
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for case in part.cases(fast):
            files = {seed: file_of(out, part, case, seed) for seed in range(3)}
            of_case = {seed: json.loads(file.read_text()) for seed, file in files.items() if file.is_file()}
            if of_case:
                runs[case] = of_case
        found[part.name] = runs
    return found


def read(document: Any) -> dict[str, Figures]:
    """The same from `beside.json`, whose keys are all words."""
    return {
        part: {case: {int(seed): found for seed, found in of_case.items()} for case, of_case in runs.items()}
        for part, runs in document.items()
    }


def write_page(figures: dict[str, Figures], parts: Sequence[Part], docs: Path, *, fast: bool) -> None:
    """Write the page, its data and its pictures into `docs`, made if it is not there."""
    (docs / "beside").mkdir(parents=True, exist_ok=True)
    (docs / "beside.json").write_text(json.dumps(figures, indent=1) + "\n")
    for part in parts:
        if figures[part.name]:
            picture = Figure(figsize=(7.5, 3.8), layout="constrained")
            part.picture(figures[part.name], picture.subplots())
            picture.savefig(docs / "beside" / f"{part.name}.png", dpi=130, metadata={"Software": None})
    (docs / "beside.md").write_text(render(figures, parts, fast=fast))


def render(figures: dict[str, Figures], parts: Sequence[Part], *, fast: bool) -> str:
    """The page of `beside.json`."""
    found = [HEAD]
    for part in parts:
        found.append(f"## {part.title}")
        runs = figures[part.name]
        lacking = [
            f"{case}, seed {seed}"
            for case in part.cases(fast)
            for seed in ((0,) if fast else range(3))
            if seed not in runs.get(case, {})
        ]
        if runs:
            found += [part.section(runs), f"![{part.title}](beside/{part.name}.png)"]
        if lacking:
            found.append(f"Not measured yet: {'; '.join(lacking)}.")
    return "\n\n".join(found) + "\n"
