"""Fits that have nothing to find, and one that cannot be fixed this way: what they say, and what their patches do.

    python -m samples.null_run --out out/results

| what is fitted | |
|---|---|
| unpoisoned | the pairs of `vit/badnets-fixed`, on the twin that was never poisoned |
| wrong tokens | the same pairs on the poisoned model, the suspect token of each pair drawn at random |
| wrong classes | the same pairs on the poisoned model, their classes shuffled |
| blended | the pairs of `vit/blended`: the trigger is in every token |

Each is fitted with `force`, so that there is a patch, which is measured on the evaluation part; what matters there is
the accuracy that is lost, and how many clean inputs are flagged or changed. Beside it stands why there would be none
without `force`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.cli import progress_bars
from atpatch_onnx.report.rows import percent
from atpatch_onnx.report.verdict import missed_goal, needless
from atpatch_onnx.running.sessions import Progress, silent
from samples import fashion
from samples.case import Case, folder_of
from samples.page_tables import table
from samples.pieces import ROOT

PAIRS, UNSEEN = 1_500, 2_000
"""Pairs of a fit, and of its evaluation, at most."""

TRIGGERED, BLENDED = "vit/badnets-fixed", "vit/blended"


def unpoisoned(case: Case, out: Path) -> Case:
    """The same pairs on the model that was never poisoned."""
    return replace(case, base=out / f"vit-clean-{case.seed}" / "base.onnx")


def wrong_tokens(case: Case, out: Path) -> Case:
    """Suspects drawn at random, one a pair, the class token left out."""
    (site, *_) = atp.find_sites(atp.load(case.base))
    assert isinstance(site.columns, int), "pictures have as many tokens each"
    marks = np.zeros((len(case.debug), site.columns), np.bool_)
    drawn = np.random.default_rng(case.seed).integers(1, site.columns, size=len(case.debug))
    marks[np.arange(len(case.debug)), drawn] = True
    return replace(case, debug=case.debug.with_suspects(marks))


def wrong_classes(case: Case, out: Path) -> Case:
    """Classes shuffled over the pairs of the fit."""
    debug, labels = case.debug, case.debug.labels
    assert labels is not None, "the case has labels"
    shuffled = np.random.default_rng(case.seed).permutation(labels)
    wrong = atp.DebugSet.from_pairs(debug.clean, debug.counterfactual, shuffled, target=debug.target)
    return replace(case, debug=wrong)


NULLS: Mapping[str, tuple[str, Callable[[Case, Path], Case]]] = {
    "unpoisoned": (TRIGGERED, unpoisoned),
    "blended": (BLENDED, lambda case, out: case),
    "wrong tokens": (TRIGGERED, wrong_tokens),
    "wrong classes": (TRIGGERED, wrong_classes),
}
"""From a case to what is fitted."""


def measure(case: Case, progress: Progress = silent) -> dict[str, Any]:
    """What a fit says, and what its patch does, as JSON types."""
    base = atp.load(case.base)
    debug, unseen = (
        pairs.take(range(min(len(pairs), most))) for pairs, most in ((case.debug, PAIRS), (case.unseen, UNSEEN))
    )
    patch = atp.fit(base, debug, replace(case.options, force=True), progress=progress)
    said = needless(patch.figures) or missed_goal(patch.figures) or ("The goal is met.",)
    found = atp.evaluate(base, atp.bake(base, patch), unseen, progress=progress).to_json()
    kept = ("accuracy_base", "accuracy_patched", "accuracy_lost", "clean_flag_rate", "clean_changed", "backdoor")
    return {
        "said": " ".join(said),
        "meets_target": patch.meets_target,
        "at_best": patch.figures["at_best"],
        **{name: found[name] for name in kept},
    }


def render(document: Mapping[str, Any]) -> str:
    """The page of `null_run.json`."""
    rows, said = [], []
    for name, found in document["runs"].items():
        attack = found["backdoor"]
        rows.append(
            (
                name,
                f"{100 * found['accuracy_lost']['value']:+z.2f}",
                percent(found["clean_flag_rate"]["value"]),
                percent(found["clean_changed"]["value"]),
                percent(attack["asr_base"]["value"]),
                percent(attack["asr_above_floor"]["value"]),
            )
        )
        said.append(f"- **{name}**: {found['said']}")
    header = (
        "fitted on",
        "accuracy lost, points",
        "clean flagged",
        "clean changed",
        "ASR, base",
        "ASR above floor, patched",
    )
    parts = [
        "# Nothing to find",
        f"Written by `python -m samples.null_run`, seed 0, Fashion-MNIST ViT, at most {PAIRS:,} pairs for a fit and"
        f" {UNSEEN:,} to evaluate. A fit on a model that was not poisoned, on tokens or classes that are wrong, and on"
        " a trigger that no token owns. The patches below were written with `force`; the figures are of the evaluation"
        f" part, and stand in [null_run.json](null_run.json). Measured: {', '.join(document['runs'])}.",
        "## In short",
        "Why there would be no patch without `force`:",
        "\n".join(said),
        "## What the patches do",
        table(header, rows),
        "Wrong classes change the figures of a fit and nothing else: detectors do not read them.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the page; 1 where a fit that has nothing to find says that its goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="folder of models")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "evidence", help="folder of the page")
    parser.add_argument("--fast", action="store_true", help="the smaller bases")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    options = parser.parse_args(arguments)
    file = options.docs / "null_run.json"
    if not options.render:
        runs: dict[str, Any] = {}
        options.docs.mkdir(parents=True, exist_ok=True)
        for name, (case, change) in NULLS.items():
            with progress_bars() as progress:
                folder = folder_of(options.out, case, 0)
                made = fashion.prepare(case, seed=0, fast=options.fast, folder=folder, progress=progress)
                runs[name] = measure(change(made, options.out), progress)
            file.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    document = json.loads(file.read_text())
    (options.docs / "null_run.md").write_text(render(document))
    nothing = [run for name, run in document["runs"].items() if name in ("unpoisoned", "blended")]
    return int(any("The goal is met" in run["said"] for run in nothing))


if __name__ == "__main__":
    sys.exit(main())
