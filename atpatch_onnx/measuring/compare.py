"""Which fix serves a model best: try them one after the other, and measure each on pairs that no fit saw.

    hold pairs out -> measure the problem -> isolate neurons (IDNN) -> repair neurons (CARE) -> patch attention
    (AtPatch) -> attention after each of the two -> the table, and a recommendation with its reason

A fix that misses its goal is measured as well: the table is to show by how much.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx_ir as ir

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset.split import part_rows
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.fitting.goal import Goal, Outcome
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.preparation import complete
from atpatch_onnx.graph import ModelOrPath
from atpatch_onnx.matching import batching
from atpatch_onnx.measuring.evaluate import Evaluation, evaluate
from atpatch_onnx.neurons import IsolationOptions, RepairOptions, isolate, repair
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.predictions import prediction_output
from atpatch_onnx.running.sessions import Progress, Session, silent
from atpatch_onnx.running.timing import Run, in_turns, ratio

HELD_OUT = 0.25
"""Share of the pairs that no fit sees."""

ROUNDS, SESSIONS = 30, 3
"""How often a fix is timed against the base, and how often both are opened for that."""


@dataclass(frozen=True, eq=False)
class Fix:
    """One fix that was tried."""

    name: str
    patches: tuple[Patch, ...]
    """In the order in which they are baked; empty where none could be made."""

    seconds: float
    """That it took to make, together with those that it comes after."""

    evaluation: Evaluation | None
    """On the held-out pairs; None where there is no patch."""

    time: float | None
    """Per inference of a clean input, over the base's."""

    failure: str = ""
    """Why there is no patch."""

    @property
    def outcome(self) -> Outcome | None:
        """The evaluation as what a goal is held against."""
        found = self.evaluation
        if found is None:
            return None
        attack, fairness = found.backdoor, found.fairness
        remaining = attack.asr_above_floor if attack is not None else fairness.uf_patched if fairness else None
        assert remaining is not None, "pairs are of a backdoor or of an attribute"
        return Outcome(
            kind="backdoor" if attack is not None else "attribute",
            remaining=remaining.value,
            accuracy_base=found.accuracy_base.value,
            accuracy=found.accuracy_patched.value,
            robust_accuracy_loss=0.0 if attack is None else attack.robust_accuracy_lost.value,
            clean_flag_rate=found.clean_flag_rate.value,
            recall=found.columns.recall.value if found.columns else 1.0,  # neuron edits have no columns to miss
            precision=found.columns.precision.value if found.columns else 0.0,
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON types, without precision-recall curves."""
        found = None if self.evaluation is None else self.evaluation.to_json()
        for level in ("columns", "input_level"):
            if found is not None and found[level] is not None:
                del found[level]["curve"]
        return {
            "name": self.name,
            "patches": [_patch_json(patch) for patch in self.patches],
            "seconds": self.seconds,
            "evaluation": found,
            "time": self.time,
            "failure": self.failure,
        }


def _patch_json(patch: Patch) -> dict[str, Any]:
    """What a patch is, and which setting its search ended with."""
    return {
        "id": patch.id,
        "method": patch.figures.get("method", "attention"),
        "setting": patch.figures.get("setting"),
        "sites": [site.site for site in patch.sites],
        "units": {edit.layer: edit.units.tolist() for edit in patch.edits},
    }


@dataclass(frozen=True, eq=False)
class Ladder:
    """All fixes beside each other."""

    kind: str
    goal: Goal
    pairs: int
    """Held-out pairs that they are measured on."""

    fixes: tuple[Fix, ...]

    @property
    def recommended(self) -> Fix | None:
        """The one that meets the goal and changes fewest clean inputs, then leaves least; None where no fix was made.

        Where none meets the goal: the nearest to it.
        """
        tried = [(fix, fix.outcome) for fix in self.fixes]
        measured = [(fix, outcome) for fix, outcome in tried if outcome is not None]
        if not measured:
            return None

        def rank(entry: tuple[Fix, Outcome]) -> tuple[float, ...]:
            fix, outcome = entry
            assert fix.evaluation is not None
            return (outcome.excess(self.goal), fix.evaluation.clean_changed.value, outcome.remaining)

        return min(measured, key=rank)[0]

    def shortfalls(self, fix: Fix) -> list[str]:
        """By how much a fix misses the goal on the held-out pairs."""
        outcome = fix.outcome
        return [fix.failure] if outcome is None else list(outcome.shortfalls(self.goal))

    @property
    def reason(self) -> str:
        """Why that one, in a sentence."""
        best = self.recommended
        if best is None or best.outcome is None or best.evaluation is None:
            return "No fix could be made: " + "; ".join(f"{fix.name}: {fix.failure}" for fix in self.fixes)
        shortfalls = best.outcome.shortfalls(self.goal)
        if shortfalls:
            missed = "; ".join(shortfalls)
            return f"None meets the goal on {self.pairs} held-out pairs. {best.name} comes nearest: {missed}."
        others = [
            fix.name
            for fix in self.fixes
            if fix is not best and fix.outcome is not None and not fix.outcome.shortfalls(self.goal)
        ]
        changed = best.evaluation.clean_changed.value
        line = f"{best.name} meets the goal on {self.pairs} held-out pairs and changes {changed:.2%} of clean inputs"
        if not others:
            return f"{line}; no other does."
        return f"{line}; of the others that do, none changes fewer: {', '.join(others)}."

    def to_json(self) -> dict[str, Any]:
        """The fixes and the recommendation as plain JSON types."""
        return {
            "kind": self.kind,
            "pairs": self.pairs,
            "fixes": [{**fix.to_json(), "shortfalls": self.shortfalls(fix)} for fix in self.fixes],
            "recommended": None if self.recommended is None else self.recommended.name,
            "reason": self.reason,
        }


def compare(
    model: ModelOrPath,
    pairs: DebugSet,
    options: FitOptions | None = None,
    *,
    unseen: DebugSet | None = None,
    isolation: IsolationOptions | None = None,
    repairing: RepairOptions | None = None,
    progress: Progress = silent,
) -> Ladder:
    """Try every fix for a model and measure them beside each other.

    Args:
        model: The base, or its path.
        pairs: A debug set; a quarter of it is held out, unless `unseen` is given.
        options: Of the fits: goal, output, batch size and seed hold for all of them.
        unseen: A debug set to measure the fixes on; `pairs` are for the fits.
        isolation: Of IDNN, but for these four; None: the defaults.
        repairing: Of CARE, but for these four; None: the defaults.
        progress: Told of what is done.

    Raises:
        DebugSetError: A debug set does not fit the model, shows no effect or is too small to hold pairs out.
        FitError: A backdoor's target class cannot be inferred.
    """
    options = replace(options or FitOptions(), force=True)
    seen, unseen = held_out(pairs, options.seed) if unseen is None else (pairs, unseen)
    base = as_model(model)
    seen, _ = complete(base, seen, output=options.output, batch_size=options.batch_size, progress=progress)
    if seen.target is not None:
        unseen = unseen.with_target(seen.target)
    shared = {name: getattr(options, name) for name in ("goal", "output", "batch_size", "seed", "force")}
    isolation, repairing = isolation or IsolationOptions(), repairing or RepairOptions()
    editing = replace(isolation, **shared), replace(repairing, **shared)
    bench = _Bench(base, seen, unseen, options, *editing, progress)
    return Ladder(seen.kind, options.goal, len(unseen), tuple(bench.fixes()))


def held_out(pairs: DebugSet, seed: int) -> tuple[DebugSet, DebugSet]:
    """Pairs for the fits, and pairs to measure on."""
    shares = {"fits": 1 - HELD_OUT, "held out": HELD_OUT}
    rows = part_rows(pairs.clean, pairs.counterfactual, pairs.labels, shares=shares, seed=seed)
    return pairs.take(rows["fits"]), pairs.take(rows["held out"])


@dataclass(frozen=True, eq=False)
class _Bench:
    """What all fixes have in common."""

    base: ir.Model
    seen: DebugSet
    unseen: DebugSet
    options: FitOptions
    isolation: IsolationOptions
    repair: RepairOptions
    progress: Progress

    def fixes(self) -> Iterator[Fix]:
        isolation = self.fix("IDNN", (), lambda: isolate(self.base, self.seen, self.isolation, progress=self.progress))
        yield isolation
        repaired = self.fix("CARE", (), lambda: repair(self.base, self.seen, self.repair, progress=self.progress))
        yield repaired
        yield self.fix("AtPatch", (), lambda: fit(self.base, self.seen, self.options, progress=self.progress))
        for before in (isolation, repaired):
            if before.patches:
                yield self.after(before)

    def after(self, before: Fix) -> Fix:
        """Attention patched in a model whose neurons are edited already."""

        def attention() -> Patch:
            return fit(self.base, self.seen, self.options, after=before.patches, progress=self.progress)

        fix = self.fix(f"{before.name} + AtPatch", before.patches, attention)
        return replace(fix, seconds=before.seconds + fix.seconds)

    def fix(self, name: str, before: Sequence[Patch], make: Callable[[], Patch]) -> Fix:
        started = time.monotonic()
        try:
            patches = (*before, make())
        except AtPatchError as error:
            return Fix(name, (), time.monotonic() - started, None, None, str(error))
        seconds = time.monotonic() - started
        patched = bake(self.base, patches)
        run: dict[str, Any] = {"batch_size": self.options.batch_size, "progress": self.progress}
        evaluation = evaluate(self.base, patched, self.unseen, output=self.options.output, **run)
        return Fix(name, patches, seconds, evaluation, self.time(patched))

    def time(self, patched: ir.Model) -> float:
        """Time of a clean input over the base's: the two in turns, medians."""
        one = self.unseen.take([0]).clean

        def opened(model: ir.Model) -> Run:
            session = Session(model, batching=batching(model))
            return lambda: session.collect(one, [self.output])

        forms = {"base": partial(opened, self.base), "patched": partial(opened, patched)}
        taken = in_turns(forms, sessions=SESSIONS, rounds=ROUNDS)
        return ratio(taken["patched"], taken["base"]).value

    @property
    def output(self) -> str:
        return prediction_output(self.base, self.options.output, batching(self.base))
