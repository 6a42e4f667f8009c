"""What each part of the method is worth: the same case, with one thing changed at a time.

    python -m samples.ablations --case vit/badnets-fixed --seed 0 --out out/ablations

The fit goes as usual; then each variant is judged on the first `PAIRS` evaluation pairs, in a session of the trial
graph, which computes what the baked graph does. Variants of the detector are trained, calibrated and searched anew;
variants of the redistribution keep the sites and the thresholds that the fit chose.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset
from rich.console import Console
from rich.table import Table

import atpatch_onnx as atp
from atpatch_onnx.baking.features import choose_features
from atpatch_onnx.cli import progress_bars
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.fitting.calibrate import Calibration
from atpatch_onnx.fitting.collect import Columns, collect, find_suspects
from atpatch_onnx.fitting.detector import train_detector
from atpatch_onnx.fitting.goal import Outcome
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.preparation import Prepared, prepare
from atpatch_onnx.fitting.scored import ScoredPart
from atpatch_onnx.fitting.search import Found, Search
from atpatch_onnx.fitting.switchboard import Setting, Trial
from atpatch_onnx.fitting.training import Training
from atpatch_onnx.graph import opset_version
from atpatch_onnx.graph.names import DOMAIN, DOMAIN_VERSION
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import OFFSET, Array, Detector, Features, Redistribution, SitePatch
from atpatch_onnx.report.rows import percent
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Progress, silent
from samples.case import Case
from samples.tasks import CASES
from samples.tasks import prepare as prepare_case

PAIRS = 4_000
"""Evaluation pairs that every variant is judged on."""

RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Clean flag rates of the threshold sweep, as shares of the calibration part."""

Entries = Sequence[tuple[AttentionSite, SitePatch]]


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
    ours = bench.fitted(bench.entries(_contrastive))
    found = {"as it is": ours.outcome()}
    found |= {name: change(bench, ours) for name, change in _REDISTRIBUTIONS.items()}
    found["logistic head instead of contrastive learning"] = bench.fitted(bench.entries(_logistic)).outcome()
    found["maps averaged over heads"] = bench.fitted(bench.entries(average_heads)).outcome()
    for rate in RATES:
        found[f"threshold at {rate:.2%} of clean inputs"] = ours.outcome(_threshold_at(ours, rate))
    return tuple(Row(variant, outcome, ours.count) for variant, outcome in found.items())


# The common part


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A search that ended, and the evaluation pairs scored in the same trial."""

    entries: Entries
    calibration: Calibration
    found: Found
    unseen: ScoredPart

    @property
    def setting(self) -> Setting:
        return self.found.setting

    def outcome(self, setting: Setting | None = None) -> Outcome:
        return self.unseen.outcome(setting or self.setting)

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
    """What all variants of a case share: the base, its parts, and the columns that were collected once."""

    model: ir.Model
    options: FitOptions
    prepared: Prepared
    unseen: DebugSet
    columns: tuple[Columns, ...]
    progress: Progress

    @classmethod
    def of(cls, case: Case, progress: Progress) -> "_Bench":
        model = atp.load(case.base)
        prepared = prepare(model, case.debug, case.options, progress)
        unseen = case.unseen.take(range(min(len(case.unseen), PAIRS)))
        unseen = find_suspects(model, prepared.sites, unseen, progress=progress)
        if prepared.debug.target is not None:
            unseen = unseen.with_target(prepared.debug.target)
        kinds = {site: choose_features(site, case.options.features) for site in prepared.sites}
        columns = collect(model, kinds, prepared.parts.fit, seed=case.options.seed, progress=progress)
        return cls(model, case.options, prepared, unseen, columns, progress)

    def entries(self, train: Callable[[Columns, Training, int], Detector]) -> Entries:
        """Every site with a detector trained by `train(columns, training, seed)`."""
        return [
            (
                columns.site,
                SitePatch(
                    columns.site.name,
                    train(columns, self.options.training, self.options.seed),
                    Redistribution(np.ones((1, 1, 1), np.float32), columns.neutral),
                ),
            )
            for columns in self.columns
        ]

    def scored(self, entries: Entries, instead: Sequence[ir.Function] = ()) -> Iterator[ScoredPart]:
        """Calibration, validation and evaluation parts, scored in one trial."""
        trial = Trial(self.model, entries, self.prepared.output, instead=instead)
        parts = self.prepared.parts
        for part in (parts.calibration, parts.validation, self.unseen):
            yield ScoredPart(trial, part, batch_size=self.options.batch_size, progress=self.progress, stage="scoring")

    def fitted(self, entries: Entries) -> _Fitted:
        """Calibrate and search as `atp.fit` does where sites decide alone."""
        calibration_part, validation_part, unseen = self.scored(entries)
        calibration = Calibration.of(calibration_part, self.options)
        found = Search(validation_part, calibration, self.options, self.progress).run()
        return _Fitted(entries, calibration, found, unseen)


# Variants of the redistribution: same sites, same thresholds


def _with_own_values(bench: _Bench, ours: _Fitted) -> Outcome:
    """The paper's way: a flagged token hands over its own value."""
    entries = [
        (site, replace(entry, redistribution=replace(entry.redistribution, neutral=None)))  # type: ignore[type-var]
        for site, entry in ours.entries
    ]
    *_, unseen = bench.scored(entries)
    return unseen.outcome(ours.setting)


def _without_rescaling(bench: _Bench, ours: _Fitted) -> Outcome:
    """The other columns stay as they are: rows no longer sum to one."""
    *_, unseen = bench.scored(ours.entries, [unscaled(opset_version(bench.model))])
    return unseen.outcome(ours.setting)


def unscaled(version: int) -> ir.Function:
    """The function `Redistributed` without rescaling, for a model that imports this opset."""
    function = ir.from_proto(Redistributed.to_function_proto())
    assert isinstance(function, ir.Function)
    function.opset_imports[""] = version
    return function


def _without_carry(bench: _Bench, ours: _Fitted) -> Outcome:
    """Each redistributing site has to detect for itself, all under the one budget, at one threshold each."""
    apart = [(replace(site, token_axis=site.name), entry) for site, entry in ours.entries]  # flags follow the axis
    *_, unseen = bench.scored(apart)
    thresholds = ours.calibration.thresholds(list(ours.setting.betas))
    return unseen.outcome(replace(ours.setting, thresholds=thresholds, reaches={}))


def _with_one_threshold(bench: _Bench, ours: _Fitted) -> Outcome:
    """That of a flagged input's other columns is not lower."""
    return ours.outcome(replace(ours.setting, reaches={}))


def _with_benign_attention(beta: float) -> Callable[[_Bench, _Fitted], Outcome]:
    def change(bench: _Bench, ours: _Fitted) -> Outcome:
        return ours.outcome(replace(ours.setting, betas=dict.fromkeys(ours.setting.betas, beta)))

    return change


def _with_a_profile(bench: _Bench, ours: _Fitted) -> Outcome:
    """Benign attention as benign columns receive it on average, per head and query; at most the uniform share."""
    profiles = {columns.site.name: _profile(columns) for columns in bench.columns}
    return ours.outcome(replace(ours.setting, betas={name: profiles[name] for name in ours.setting.betas}))


def _profile(columns: Columns) -> Array:
    benign = np.concatenate([columns.hard, columns.benign])
    mean = benign.mean(axis=0, dtype=np.float64).reshape(_heads(columns), -1)
    if columns.features is Features.SUMMARY:
        mean = mean[:, :1]  # of the summaries, the mean over queries
    elif columns.features is Features.LANDMARKS:
        mean = mean.mean(axis=1, keepdims=True)
    return np.asarray(mean.clip(0, 1)[:, :, None], np.float32)


def _heads(columns: Columns) -> int:
    assert isinstance(columns.site.heads, int), "every base of the samples has a fixed number of heads"
    return columns.site.heads


_REDISTRIBUTIONS: Mapping[str, Callable[[_Bench, _Fitted], Outcome]] = {
    "own values (the paper's)": _with_own_values,
    "without rescaling": _without_rescaling,
    "without carry": _without_carry,
    "one threshold for all columns": _with_one_threshold,
    "benign attention zero": _with_benign_attention(0.0),
    "benign attention uniform": _with_benign_attention(1.0),
    "benign attention as a profile": _with_a_profile,
}

_domain = Opset(DOMAIN, DOMAIN_VERSION)


@script(_domain, default_opset=op)
def Redistributed(benign, mass, r, counts, beta, handed):  # type: ignore[no-untyped-def]  # noqa: N802
    """As the function of this name in `atpatch_onnx.baking.functions`, but what is not flagged keeps its weight."""
    start = op.Constant(value_ints=[0])
    end = op.Constant(value_ints=[9223372036854775807])
    last = op.Constant(value_ints=[-1])
    axis = op.Constant(value_ints=[3])
    n = op.Max(op.Slice(counts, start, last, axis), op.Constant(value_float=1.0))
    return benign + handed * (mass * beta * op.Slice(counts, last, end, axis) / n)


# Variants of the detector: trained, calibrated and searched anew


def _contrastive(columns: Columns, training: Training, seed: int) -> Detector:
    return train_detector(columns, training, seed=seed)


def _logistic(columns: Columns, training: Training, seed: int) -> Detector:
    return train_detector(columns, training, "logistic", seed=seed)


def average_heads(columns: Columns, training: Training, seed: int = 0) -> Detector:
    """A detector that sees all heads as one, their geometric mean: trained on it, then written for all heads alike.

    Detectors read logarithms, whose mean over heads is the logarithm of the geometric mean.
    """
    heads = _heads(columns)

    def averaged(rows: Array) -> Array:
        logarithms = np.log(rows + OFFSET).reshape(len(rows), heads, rows.shape[1] // heads)
        return np.asarray(np.exp(logarithms.mean(axis=1)) - OFFSET, np.float32)

    mean = replace(
        columns,
        anomalous=averaged(columns.anomalous),
        hard=averaged(columns.hard),
        benign=averaged(columns.benign),
    )
    detector = train_detector(mean, training, seed=seed)
    return replace(
        detector,
        mean=np.tile(detector.mean, (heads, 1)),
        scale=np.tile(detector.scale, (heads, 1)),
        weight_1=np.tile(detector.weight_1, (1, heads)) / np.float32(heads),
    )


def _threshold_at(ours: _Fitted, rate: float) -> Setting:
    """The detecting sites' thresholds where each flags this share of the clean calibration inputs; no lower ones."""
    clean = ours.calibration.clean
    thresholds = {name: float(np.quantile(clean[name], 1 - rate)) for name in ours.setting.thresholds}
    return replace(ours.setting, thresholds=thresholds, reaches={})


# The command


def table(rows: Sequence[Row], title: str) -> Table:
    """The variants, one a line."""
    made = Table("variant", "left", "accuracy lost", "clean inputs flagged", "recall", "precision", title=title)
    for row in rows:
        of = row.outcome
        figures = (of.remaining, of.accuracy_base - of.accuracy, of.clean_flag_rate, of.recall, of.precision)
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
