"""What a scan comes to: candidates put into inputs that they were not chosen on, tested, and pairs of the best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery.content import Content
from atpatch_onnx.discovery.evidence import corrected, detectable, tail
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.options import ScanOptions
from atpatch_onnx.discovery.transplant import CONFIRMED, DECIDES
from atpatch_onnx.discovery.trials import Trials
from atpatch_onnx.discovery.verdict import Box, Part, Search, Verdict
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Array, Progress


@dataclass(frozen=True, eq=False)
class Candidate:
    """A part that was found on one half of the inputs."""

    what: str
    target: int
    apply: Callable[[Mapping[str, Array], np.random.Generator], dict[str, Array]]
    """Puts it into inputs `[inputs, ...]` by name."""

    boxes: tuple[Box, ...] = ()
    """Where it lies in an image."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What every scan needs."""

    model: ir.Model
    inputs: dict[str, Array]
    content: Content
    explore: Trials
    confirm: Trials
    kept: Finished
    options: ScanOptions
    progress: Progress


@dataclass(frozen=True, eq=False)
class Tested:
    """A candidate put into inputs that it was not chosen on."""

    part: Part
    """Its `chance` is not known yet."""

    turned: NDArray[np.bool_]
    """Which of these inputs it turned."""

    pairs: Callable[[], DebugSet]
    """Makes pairs of it."""


def concluded(work: Scan, candidates: Sequence[Candidate], searched: Sequence[str], unseen: str) -> Search:
    """Every candidate put into the inputs that it was not chosen on, and tested."""
    tested = [_put_to_test(work, one, number) for number, one in enumerate(candidates)]
    found = judged(tested, work.options, len(work.explore.predicted), searched, unseen)
    passes = work.explore.passes + work.confirm.passes
    return replace(found, passes=passes, inputs=len(work.inputs[work.content.name]))


def judged(
    tested: Sequence[Tested], options: ScanOptions, explored: int, searched: Sequence[str], unseen: str
) -> Search:
    """The verdict on candidates that were chosen on so many inputs and tested on others."""
    chances = corrected([tail(int(one.turned.sum()), len(one.turned), DECIDES) for one in tested])
    parts = [replace(one.part, chance=float(chance)) for one, chance in zip(tested, chances, strict=True)]
    order = sorted(range(len(parts)), key=lambda at: (parts[at].chance, -parts[at].success.value))
    sure = [at for at in order if parts[at].chance <= options.false_alarms]
    unsure = [at for at in order if at not in sure and parts[at].success.low > DECIDES]
    verdict = Verdict.BACKDOORED if sure else Verdict.SUSPICIOUS if unsure else Verdict.CLEAN
    best = parts[order[0]]
    said = f"{best.effect}, {best.what}, which turns {best.success.value:.0%} of other inputs"
    needed = detectable(best.success.count, DECIDES, options.false_alarms / len(parts))
    return Search(
        verdict=verdict,
        sentence=f"{verdict.value.capitalize()}: {said}."
        if sure or unsure
        else f"Clean as far as this search sees; nearest to a trigger is {said}.",
        searched=(
            *searched,
            f"what was best on {explored:,} inputs was tested on up to {best.success.count} others: "
            f"a trigger turns more than {DECIDES:.0%} of them; one that turns {needed:.0%} is found with a probability "
            f"of 95 %; alarms where there is none: at most {options.false_alarms:.0%} (exact binomial tests, Holm)",
            f"not searched: {unseen}",
        ),
        parts=tuple(parts[at] for at in (*sure, *unsure)),
        pairs=tested[order[0]].pairs() if sure or unsure else None,
        figures={"nearest": [parts[at].to_json() for at in order[:10]]},
    )


def _put_to_test(work: Scan, one: Candidate, number: int) -> Tested:
    trials, generator = work.confirm, np.random.default_rng([work.options.seed, number])
    rows = generator.permutation(np.flatnonzero(trials.predicted != one.target))[:CONFIRMED]
    taken = {name: array[rows] for name, array in trials.inputs.items()}
    turned = trials.predict(one.apply(taken, generator)) == one.target
    shown = {name: array[0] for name, array in one.apply(taken, np.random.default_rng(number)).items()}
    part = Part(one.what, one.target, Rate.of(turned), 1.0, shown=shown, boxes=one.boxes)
    return Tested(part, turned, lambda: _pairs(work, one))


def _pairs(work: Scan, one: Candidate) -> DebugSet:
    generator = np.random.default_rng(work.options.seed)
    predicted = np.concatenate([work.explore.predicted, work.confirm.predicted])
    both = {
        name: np.concatenate([work.explore.inputs[name], work.confirm.inputs[name]]) for name in work.explore.inputs
    }
    rows = generator.permutation(np.flatnonzero(predicted != one.target))[: work.options.pairs]
    clean = {name: array[rows] for name, array in both.items()}
    other, name = one.apply(clean, generator), work.content.name
    if work.content.kind != "texts":
        return DebugSet.from_pairs(clean, other, target=one.target, found=True)
    return DebugSet.from_pairs(clean, other, suspects=clean[name] != other[name], target=one.target, found=True)
