"""What each part of the method is worth: the same case, with one thing changed at a time.

    python -m samples.ablations --case vit/badnets-fixed --seed 0 --out out/ablations

The fit goes as usual; then each variant is judged on the first `PAIRS` evaluation pairs, in a session of the fit's
graph, which computes what the baked graph does. Variants of the redistribution keep the sites and the thresholds that
the fit chose; the other kind of detectors is trained, calibrated and searched anew.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

import atpatch_onnx as atp
from atpatch_onnx.baking.write import Written
from atpatch_onnx.cli import progress_bars
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.fitting.calibrate import Calibration
from atpatch_onnx.fitting.collect import Tokens, collect, find_suspects
from atpatch_onnx.fitting.fit import Entries, train
from atpatch_onnx.fitting.goal import Outcome
from atpatch_onnx.fitting.options import FitOptions, Kind
from atpatch_onnx.fitting.preparation import Prepared, prepare
from atpatch_onnx.fitting.scored import ScoredPart
from atpatch_onnx.fitting.search import Found, Search
from atpatch_onnx.fitting.switchboard import Setting, Switchboard
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Neutral, SitePatch
from atpatch_onnx.report.rows import percent
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Progress, silent
from samples import redistributions
from samples.case import Case
from samples.tasks import CASES
from samples.tasks import prepare as prepare_case

PAIRS = 4_000
"""Evaluation pairs that every variant is judged on."""

RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Clean flag rates of the threshold sweep, as shares of the calibration part."""

Change = Callable[[ir.Model, Sequence[Written]], None]

REDISTRIBUTIONS: Mapping[str, Change] = {
    "key alone (own value)": redistributions.key_alone,
    "value alone (own key)": redistributions.value_alone,
    "masked out": redistributions.masked_out,
    "columns of the map, neutral value (before this edition)": redistributions.benign_columns,
    "columns of the map, own value (the paper's)": redistributions.papers_columns,
}
"""Same sites, same flags."""


@dataclass(frozen=True)
class Row:
    """One variant."""

    variant: str
    outcome: Outcome
    count: int
    """Inputs that ASR above floor, or UF, is counted on."""

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return {"variant": self.variant, "count": self.count, **asdict(self.outcome)}


def ablate(case: Case, progress: Progress = silent) -> tuple[Row, ...]:
    """Every variant of one case, the method as it is first."""
    bench = _Bench.of(case, progress)
    fits = {kind: bench.fitted(kind) for kind in case.options.detectors}
    ours = min(fits.values(), key=lambda fit: (fit.found.outcome.excess(case.options.goal), fit.kind != "linear"))
    found = {f"as it is ({ours.kind} detectors)": ours.outcome()}
    for name, change in REDISTRIBUTIONS.items():
        found[name] = bench.unseen_part(ours.entries, change).outcome(ours.found.setting)
    found["zero key"] = bench.unseen_part(_with_zero_keys(ours.entries)).outcome(ours.found.setting)
    found["without carry"] = bench.without_carry(ours)
    found |= {f"{fit.kind} detectors": fit.outcome() for fit in fits.values() if fit is not ours}
    for rate in RATES:
        found[f"threshold at {rate:.2%} of clean inputs"] = ours.unseen.outcome(_threshold_at(ours, rate))
    return tuple(Row(variant, outcome, ours.count) for variant, outcome in found.items())


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A search that ended, and the evaluation pairs scored in the same graph."""

    kind: Kind
    entries: Entries
    calibration: Calibration
    found: Found
    unseen: ScoredPart

    def outcome(self) -> Outcome:
        return self.unseen.outcome(self.found.setting)

    @property
    def count(self) -> int:
        """Evaluation inputs that could go to the target, or flip."""
        part, predicted = self.unseen.part, classes(self.unseen.clean.logits)
        if part.kind == "attribute":
            return len(part)
        labels = predicted if part.labels is None else part.labels
        return int(((labels != part.target) & (predicted != part.target)).sum())


@dataclass(frozen=True, eq=False)
class _Bench:
    """What all variants of a case share: the base, its parts, and the tokens that were collected once."""

    model: ir.Model
    options: FitOptions
    prepared: Prepared
    unseen: DebugSet
    tokens: tuple[Tokens, ...]
    progress: Progress

    @classmethod
    def of(cls, case: Case, progress: Progress) -> "_Bench":
        model = atp.load(case.base)
        prepared = prepare(model, case.debug, case.options, progress)
        unseen = case.unseen.take(range(min(len(case.unseen), PAIRS)))
        unseen = find_suspects(model, prepared.sites, unseen, progress=progress)
        if prepared.debug.target is not None:
            unseen = unseen.with_target(prepared.debug.target)
        tokens = collect(model, prepared.sites, prepared.parts.fit, seed=case.options.seed, progress=progress)
        return cls(model, case.options, prepared, unseen, tokens, progress)

    def fitted(self, kind: Kind) -> _Fitted:
        """Train, calibrate and search as `atp.fit` does."""
        entries = train(self.tokens, kind, self.options, self.progress)
        board, parts = Switchboard(self.model, entries, self.prepared.output), self.prepared.parts
        calibration = Calibration.of(self._scored(board, parts.calibration), self.options)
        found = Search(self._scored(board, parts.validation), calibration, self.options, self.progress).run()
        return _Fitted(kind, entries, calibration, found, self._scored(board, self.unseen))

    def unseen_part(self, entries: Entries, change: Change = lambda board, written: None) -> ScoredPart:
        """The evaluation pairs in a graph that redistributes in another way."""
        return self._scored(Switchboard(self.model, entries, self.prepared.output, change=change), self.unseen)

    def without_carry(self, ours: _Fitted) -> Outcome:
        """Each redistributing site has to detect for itself, all under the one budget, at one threshold each."""
        apart = [(replace(site, token_axis=site.name), entry) for site, entry in ours.entries]  # flags follow the axis
        chosen = ours.found.setting.redistributing
        setting = Setting(ours.calibration.thresholds(list(chosen)), chosen)
        return self.unseen_part(apart).outcome(setting)

    def _scored(self, board: Switchboard, part: DebugSet) -> ScoredPart:
        return ScoredPart(board, part, batch_size=self.options.batch_size, progress=self.progress, stage="scoring")


def _with_zero_keys(entries: Entries) -> list[tuple[AttentionSite, SitePatch]]:
    """Flagged tokens show a key of zeros: every query scores them 0."""
    changed = []
    for site, entry in entries:
        assert entry.neutral is not None, "every candidate redistributes"
        neutral = Neutral(np.zeros_like(entry.neutral.key), entry.neutral.value)
        changed.append((site, replace(entry, neutral=neutral)))
    return changed


def _threshold_at(ours: _Fitted, rate: float) -> Setting:
    """The detecting sites' thresholds where each flags this share of the clean calibration inputs."""
    clean, setting = ours.calibration.clean, ours.found.setting
    thresholds = {name: float(np.quantile(clean[name], 1 - rate)) for name in setting.thresholds}
    return replace(setting, thresholds=thresholds)


# The command


def table(rows: Sequence[Row], title: str) -> Table:
    """The variants, one a line."""
    names = ("variant", "left", "accuracy lost", "robust accuracy lost", "clean inputs flagged", "recall", "precision")
    made = Table(*names, title=title)
    for row in rows:
        of = row.outcome
        lost = of.accuracy_base - of.accuracy
        figures = (of.remaining, lost, of.robust_accuracy_loss, of.clean_flag_rate, of.recall, of.precision)
        made.add_row(row.variant, *(percent(figure) for figure in figures))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Ablate one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, choices=sorted(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/ablations"), help="folder for the base")
    parser.add_argument("--fast", action="store_true", help="the small form of the case")
    options = parser.parse_args(arguments)
    try:
        with progress_bars() as progress:
            case, _ = prepare_case(
                options.case, seed=options.seed, fast=options.fast, out=options.out, progress=progress
            )
            rows = ablate(case, progress)
    except AtPatchError as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 1
    Console().print(table(rows, f"{case.name}, seed {case.seed}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
