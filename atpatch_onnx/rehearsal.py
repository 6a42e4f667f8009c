"""Would a patch be exact on this model? Found out with a random one, before anyone fits one.

    inputs drawn  ->  the base runs  ->  a patch drawn for all sites  ->  thresholds in gaps of the observed scores
      ->  baked with thresholds that nothing exceeds: every output keeps its bits
      ->  baked with those: every site as the numpy reference, samples without a flag keep their bits
      ->  stripped: the base again

Thresholds are chosen such that one sample of the batch has flags and the others have none, as far as the drawn scores
allow it, and such that at least half of its columns stay benign.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.bake import FLAGGED, bake
from atpatch_onnx.drawing import (
    draw_detector,
    draw_inputs,
    draw_prototypes,
    draw_redistribution,
    feature_count,
    input_shapes,
)
from atpatch_onnx.emission import Emission, canonical_values, import_functions, open_site, require_opset
from atpatch_onnx.errors import AtPatchError, RunError
from atpatch_onnx.insertion import Insertion
from atpatch_onnx.inspection import SiteValues, expose, site_values, value_names
from atpatch_onnx.matching import find_sites
from atpatch_onnx.metadata import PatchRecord, read_record
from atpatch_onnx.patch import Detector, Patch, SitePatch
from atpatch_onnx.probe import choose_features
from atpatch_onnx.redistribution import attend
from atpatch_onnx.runtime import Array, Progress, Session, silent
from atpatch_onnx.sites import AttentionSite
from atpatch_onnx.strip import strip
from atpatch_onnx.verify import TOLERANCE, Check
from atpatch_onnx.weave import Controls, weave

LENGTHS = (16, 32, 64, 224, 1024)
"""Sizes that free axes are tried with, one after the other, until the base runs."""

MAX_VALUES = 2**24
"""Larger inputs are not tried."""

NEVER = 3.0
"""A threshold that no score exceeds: scores are differences of two cosines."""

_UNSEEN = -7.0
"""Margins below belong to columns that no query sees."""

DRAWS = 8
"""Pairs of prototypes that are drawn for a site until one has a threshold as wanted."""

_GAP = 1e-5
"""Two scores this far apart stay on their sides of a threshold between them, however they are rounded."""

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


@dataclass(frozen=True)
class SiteNumbers:
    """What was measured at one site, with one emission, at one level of optimization."""

    site: str
    emission: str
    optimized: bool
    """Whether onnxruntime optimized the graph."""

    columns: int
    flagged: int
    """Columns with a flag, their own or a carried one."""

    difference: float
    """Largest absolute difference between the corrected output and the numpy reference."""

    product: float
    """Largest absolute difference between the base's output and `P V`: whether map and values are what they seem."""

    allowed: float
    """How much either may be: `verify.TOLERANCE`, relative to the largest value (at least 1)."""

    untouched: bool | None
    """Whether map and values are the base's own, bit for bit; None where flags of earlier sites changed them."""

    @property
    def passed(self) -> bool:
        """Whether it is as it should be."""
        return max(self.difference, self.product) <= self.allowed and self.untouched is not False


@dataclass(frozen=True)
class Rehearsal:
    """What a random patch does to a model."""

    runs: bool
    """Whether onnxruntime runs the base."""

    reason: str
    """What onnxruntime says of the base where it does not run it; empty if it always does."""

    found: int
    """Attention sites of the model; with none, there is nothing to patch."""

    inputs: Mapping[str, tuple[int, ...]]
    """Shapes of the inputs."""

    nonfinite: tuple[str, ...]
    """Outputs of the base with NaN or infinite values."""

    checks: tuple[Check, ...]
    """Everything that was checked; those of the sites are summed up from `sites`."""

    sites: tuple[SiteNumbers, ...]

    @property
    def passed(self) -> bool:
        """Whether a patch of this model would be exact: it runs, has sites, and every check passed."""
        return self.runs and self.found > 0 and not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {
            "passed": self.passed,
            "runs": self.runs,
            "reason": self.reason,
            "found": self.found,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "nonfinite": list(self.nonfinite),
            "checks": [asdict(check) for check in self.checks],
            "sites": [asdict(of_site) for of_site in self.sites],
        }


def rehearse(
    model: graphs.ModelOrPath,
    inputs: Mapping[str, Array] | None = None,
    *,
    seed: int = 0,
    samples: int = 2,
    optimize: Sequence[bool] = (False, True),
    emissions: Sequence[Emission] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Rehearsal:
    """Find out whether a patch would be exact on a model, before one is fitted.

    Args:
        model: The base, or its path.
        inputs: One batch of inputs, `[samples, ...]` by name; drawn if there are none.
        seed: What is drawn depends on it alone.
        samples: Samples to draw, where the model leaves their number free.
        optimize: Whether onnxruntime optimizes the graphs; both by default.
        emissions: Those to try; both by default, only `branchless` for models in half precision, as `bake` does.
        threads: Threads within an operator; None: onnxruntime's choice.
        progress: Told after every step.

    Returns:
        The verdict. That the base does not run, or that a patch cannot be baked, is part of it.

    Raises:
        ModelFileError: There is no such file, or it is no model.
    """
    base = _seeded(graphs.as_model(model))
    rng = np.random.default_rng(seed)
    sites = find_sites(base)
    if emissions is None:
        halves = any(site.dtype != ir.DataType.FLOAT.name for site in sites)
        emissions = (Emission.BRANCHLESS,) if halves else tuple(Emission)
    steps = _Steps(progress, 2 + 3 * len(emissions))
    runs = _run_base(base, inputs, rng, samples, optimize, threads)
    steps.done("running the base")
    if not runs.levels:
        return Rehearsal(False, runs.reason, len(sites), runs.shapes, (), (), ())
    nonfinite = tuple(name for name, array in runs.levels[0].outputs.items() if not _finite(array))
    if not sites:
        return Rehearsal(True, runs.reason, 0, runs.shapes, nonfinite, (), ())
    checks: list[Check] = []
    numbers: list[SiteNumbers] = []
    try:
        inside = [_look_inside(base, sites, level, runs.inputs, threads) for level in runs.levels]
        entries = _draw_entries(sites, inside[0], rng)
        patch = Patch(graphs.fingerprint(base), _aimed(base, sites, entries, runs, emissions[0], rng, threads))
        steps.done("choosing thresholds")
        for emission in emissions:
            patched = bake(base, patch, emission=emission)
            quiet = _silenced(patched)
            for level in runs.levels:
                checks += _unfired(quiet, emission, level, runs.inputs, threads)
            steps.done(f"{emission}: nothing fires")
            for level, own in zip(runs.levels, inside, strict=True):
                found, of_sites = _fired(patched, sites, emission, level, own, runs.inputs, threads)
                checks += found
                numbers += of_sites
            steps.done(f"{emission}: some columns fire")
            checks.append(_stripped(patched, emission))
            steps.done(f"{emission}: stripping")
    except AtPatchError as error:
        checks.append(Check("a patch", False, str(error)))
    return Rehearsal(True, runs.reason, len(sites), runs.shapes, nonfinite, tuple(checks), tuple(numbers))


class _Steps:
    """Counts what is done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._count, self._total = progress, 0, total

    def done(self, stage: str) -> None:
        self._count += 1
        self._progress(stage, self._count, self._total)


# The base


@dataclass(frozen=True, eq=False)
class _Level:
    """The base at one level of optimization."""

    optimize: bool
    outputs: Mapping[str, Array]

    def __str__(self) -> str:
        return "default optimization" if self.optimize else "no optimization"


@dataclass(frozen=True, eq=False)
class _Inside:
    """What the base computes at its sites, at one level; everything by site."""

    maps: Mapping[str, Array]
    """`[maps, heads, queries, keys]`."""

    values: Mapping[str, Array]
    """As they meet the map."""

    value_shapes: Mapping[str, tuple[int, ...]]
    """`[maps, kv heads, keys, depth]`."""


@dataclass(frozen=True, eq=False)
class _Runs:
    """The base at all levels at which it runs."""

    inputs: Mapping[str, Array]
    levels: tuple[_Level, ...]
    reason: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.inputs.items()}


def _seeded(model: ir.Model) -> ir.Model:
    """A copy whose random operators, if there are any, draw the same in every session."""
    model = graphs.copy(model)
    for number, node in enumerate(model.graph.all_nodes()):
        if node.op_type in _RANDOM and "seed" not in node.attributes:
            node.attributes["seed"] = ir.AttrFloat32("seed", float(number))
    return model


def _is_random(model: ir.Model) -> bool:
    return any(node.op_type in _RANDOM for node in model.graph.all_nodes())


def _run_base(
    base: ir.Model,
    inputs: Mapping[str, Array] | None,
    rng: np.random.Generator,
    samples: int,
    optimize: Sequence[bool],
    threads: int | None,
) -> _Runs:
    """Run the base; drawn inputs are drawn anew with other sizes while it refuses them."""
    chosen: Mapping[str, Array] = inputs or {}
    levels: list[_Level] = []
    reasons = []
    for level in optimize:
        candidates = [chosen] if inputs is not None or levels else _drawn(base, rng, samples)
        try:
            session: Session | None = Session(base, optimize=level, threads=threads)
        except RunError as error:
            reasons.append(f"{_Level(level, {})}: {error}")
            continue
        refusals = []
        for candidate in candidates:
            try:
                session = session or Session(base, optimize=level, threads=threads)
                levels.append(_Level(level, session.run(candidate)))
                chosen = candidate
                break
            except RunError as error:
                refusals.append(str(error))
                session = None  # random operators would go on where the last run left them
        else:
            reasons.append(f"{_Level(level, {})}: {refusals[0]}")
    return _Runs(chosen, tuple(levels), "; ".join(reasons))


def _drawn(base: ir.Model, rng: np.random.Generator, samples: int) -> Iterator[Mapping[str, Array]]:
    """Inputs of growing sizes, as far as sizes are free."""
    seen: list[dict[str, tuple[int, ...]]] = []
    for length in LENGTHS:
        shapes = input_shapes(base, samples=samples, length=length)
        values = sum(math.prod(shape) for shape in shapes.values())
        if not seen or (shapes != seen[-1] and values <= MAX_VALUES):
            yield draw_inputs(base, rng, samples=samples, length=length)
        seen.append(shapes)


def _look_inside(
    base: ir.Model, sites: Sequence[AttentionSite], level: _Level, inputs: Mapping[str, Array], threads: int | None
) -> _Inside:
    """The base's own maps and values."""
    require_opset(base)
    seen = graphs.copy(base)
    names = {}
    for site in sites:
        handles, at = open_site(seen, site)
        shape = at.op("Shape", canonical_values(at, site, handles), name="rehearsal/shape")
        names[site.name] = [
            _output(seen, at, value, f"rehearsal/{index}") for index, value in enumerate((handles.P, handles.V, shape))
        ]
    import_functions(seen)
    wanted = [name for of_site in names.values() for name in of_site]
    found = Session(seen, optimize=level.optimize, threads=threads).run(inputs, wanted)
    arrays = {site: [found[name] for name in of_site] for site, of_site in names.items()}
    return _Inside(
        maps={site: P for site, (P, _, _) in arrays.items()},
        values={site: V for site, (_, V, _) in arrays.items()},
        value_shapes={site: tuple(int(size) for size in shape) for site, (_, _, shape) in arrays.items()},
    )


def _output(model: ir.Model, at: Insertion, value: ir.Value, name: str) -> str:
    """A further output of this name; the value itself may be an input or an output already."""
    result = at.op("Identity", value, name=name)
    result.type = value.type
    model.graph.outputs.append(result)
    assert result.name is not None
    return result.name


# The patch


def _draw_entries(sites: Sequence[AttentionSite], inside: _Inside, rng: np.random.Generator) -> tuple[SitePatch, ...]:
    """A patch of all sites that never fires."""
    entries = []
    for site in sites:
        features = choose_features(site)
        _, kv_heads, _, depth = inside.value_shapes[site.name]
        detector = draw_detector(rng, features, feature_count(features, inside.maps[site.name].shape), NEVER)
        entries.append(SitePatch(site.name, detector, draw_redistribution(rng, kv_heads, depth)))
    return tuple(entries)


def _aimed(
    base: ir.Model,
    sites: Sequence[AttentionSite],
    entries: Sequence[SitePatch],
    runs: _Runs,
    emission: Emission,
    rng: np.random.Generator,
    threads: int | None,
) -> tuple[SitePatch, ...]:
    """The same patch with prototypes and thresholds such that some columns of one sample fire.

    Sites are set one after the other, since flags of one move the scores of the next. A site that would not spare the
    other samples and enough columns is left to the flags that are carried to it; where none are, it is drawn anew.
    """
    trial = _Trial(base, list(zip(sites, entries, strict=True)), runs, emission, threads)
    detectors = {entry.site: entry.detector for entry in entries if entry.detector is not None}
    target = _target(trial.run(detectors).values())
    for site in sites:
        silent_one = detectors[site.name]
        best: _Aim | None = None
        carried = False
        for _ in range(DRAWS):
            found = trial.run(detectors)[site.name]
            aims = _aims(found, detectors[site.name], target)
            best = max((aim for aim in (best, *aims) if aim is not None), key=lambda aim: aim.rank, default=None)
            carried = bool(found.flags.any())
            if carried or (best is not None and best.spares):
                break
            detectors[site.name] = replace(silent_one, prototypes=draw_prototypes(rng))
        chosen = best is not None and (best.spares or not carried)
        detectors[site.name] = best.detector if best is not None and chosen else silent_one
    return tuple(replace(entry, detector=detectors[entry.site]) for entry in entries)


@dataclass(frozen=True, eq=False)
class _Scores:
    """One site's scores; all `[samples, columns]`."""

    scores: NDArray[np.float64]
    seen: NDArray[np.bool_]
    flags: NDArray[np.bool_]


def _target(scores: Iterable[_Scores]) -> int:
    """The sample that most often has the highest or the lowest score of a site."""
    leads: Counter[int] = Counter()
    for found in scores:
        if found.seen.any():
            seen = np.where(found.seen, found.scores, np.nan)
            leads.update(int(at) // seen.shape[1] for at in (np.nanargmax(seen), np.nanargmin(seen)))
    return max(leads, key=lambda sample: leads[sample], default=0)


@dataclass(frozen=True, eq=False)
class _Aim:
    """A detector that some column of the chosen sample makes fire."""

    detector: Detector
    alone: bool
    """Whether no other sample makes it fire."""

    sparing: bool
    """Whether half of the sample's columns stay benign."""

    gap: float
    """How far apart the scores on both sides of the threshold are."""

    @property
    def spares(self) -> bool:
        return self.alone and self.sparing

    @property
    def rank(self) -> tuple[bool, bool, float]:
        return (self.alone, self.sparing, self.gap)


def _aims(found: _Scores, detector: Detector, target: int) -> Iterator[_Aim]:
    """All thresholds that some column of the sample `target` exceeds."""
    half = found.seen[target].sum() / 2
    for swapped in (False, True):  # prototypes that change places negate every score exactly
        scores = -found.scores if swapped else found.scores
        prototypes = detector.prototypes[::-1] if swapped else detector.prototypes
        steps = np.unique(scores[found.seen])
        for low, high in zip([*steps[:1] - 1, *steps[:-1]], steps, strict=True):
            threshold = float(np.float32((low + high) / 2))
            own = (scores > threshold) & found.seen
            if own[target].any() and high - low >= _GAP:
                flagged = (own | found.flags)[target] & found.seen[target]
                yield _Aim(
                    replace(detector, threshold=threshold, prototypes=prototypes),
                    alone=bool(own.sum() == own[target].sum()),
                    sparing=bool(flagged.sum() <= half),
                    gap=float(high - low),
                )


class _Trial:
    """One graph and session for the whole search: thresholds and directions are inputs."""

    def __init__(
        self,
        base: ir.Model,
        entries: Sequence[tuple[AttentionSite, SitePatch]],
        runs: _Runs,
        emission: Emission,
        threads: int | None,
    ) -> None:
        self._model = graphs.copy(base)
        self._entries, self._inputs, self._threads = entries, runs.inputs, threads
        self._optimize = runs.levels[0].optimize
        woven = weave(self._model, entries, emission, self._controls)
        end = Insertion(self._model.graph, "rehearsal")
        self._outputs = {}
        for step in woven:
            assert step.margin is not None, "drawn sites detect"
            name = step.site.name
            names = [
                _output(self._model, end, value, f"{name}/{of}")
                for value, of in ((step.margin, "margin"), (step.flags, "flags"))
            ]
            self._outputs[name] = names
            # an initializer that is an input as well: a default that a run may override
            self._model.graph.inputs.append(self._model.graph.initializers[_control(name, "direction")])
        import_functions(self._model)
        self._session: Session | None = None

    def run(self, detectors: Mapping[str, Detector]) -> dict[str, _Scores]:
        """Every site's scores with these detectors, and the flags that are carried to it, or are its own."""
        feed = dict(self._inputs)
        for name, detector in detectors.items():
            feed[_control(name, "threshold")] = np.array([detector.threshold], np.float32)
            feed[_control(name, "direction")] = detector.direction
        if self._session is None or _is_random(self._model):
            self._session = Session(self._model, optimize=self._optimize, threads=self._threads)
        found = self._session.run(feed, [name for names in self._outputs.values() for name in names])
        results = {}
        for name, (margin, flags) in self._outputs.items():
            margins = np.asarray(found[margin], np.float64)
            scores = margins + detectors[name].threshold
            results[name] = _Scores(scores, margins > _UNSEEN, np.asarray(found[flags], bool))
        return results

    def _controls(self, at: Insertion, site: AttentionSite, entry: SitePatch) -> Controls:
        threshold = ir.Value(
            name=_control(site.name, "threshold"), shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        at.graph.inputs.append(threshold)
        assert entry.redistribution is not None, "drawn sites redistribute"
        return Controls(threshold, at.constant("beta", entry.redistribution.beta))


def _control(site: str, name: str) -> str:
    return f"{graphs.PREFIX}{site}/{name}"


# What must hold


def _silenced(patched: ir.Model) -> ir.Model:
    """A copy that never fires: the same graph with other thresholds."""
    quiet = graphs.copy(patched)
    for site in read_record(patched).sites:
        weight = quiet.graph.initializers[_control(site.site, "threshold")]
        weight.const_value = ir.tensor(np.array([NEVER], np.float32), name=weight.name)
    return quiet


def _unfired(
    patched: ir.Model, emission: Emission, level: _Level, inputs: Mapping[str, Array], threads: int | None
) -> Iterator[Check]:
    """Nothing fires: all outputs keep their bits."""
    where = f"{emission}, {level}"
    try:
        found = Session(patched, optimize=level.optimize, threads=threads).run(inputs)
    except RunError as error:
        yield Check(f"nothing fires, {where}", False, str(error))
        return
    changed = [name for name, array in level.outputs.items() if not _same_bits(array, found[name])]
    detail = f"outputs that changed: {', '.join(changed)}" if changed else "all outputs bit-identical to the base's"
    if found[FLAGGED].any():
        detail = "columns were flagged"
    yield Check(f"nothing fires, {where}", not changed and not found[FLAGGED].any(), detail)


def _fired(
    patched: ir.Model,
    sites: Sequence[AttentionSite],
    emission: Emission,
    level: _Level,
    own: _Inside,
    inputs: Mapping[str, Array],
    threads: int | None,
) -> tuple[list[Check], list[SiteNumbers]]:
    """Some columns fire: every site is what the reference says, and samples without a flag keep their bits."""
    where = f"{emission}, {level}"
    record = read_record(patched)
    names = [name for site in record.sites for name in value_names(site)]
    try:
        found = Session(patched, optimize=level.optimize, threads=threads).run(inputs)
        inner = Session(expose(patched, names), optimize=level.optimize, threads=threads).run(inputs, names)
    except RunError as error:
        return [Check(f"some columns fire, {where}", False, str(error))], []
    numbers = list(_site_numbers(patched, record, inner, emission, level, own))
    fired = sum(of_site.flagged > 0 for of_site in numbers)
    checks = [Check(f"sites fire, {where}", fired == len(numbers), f"{fired} of {len(numbers)} have flagged columns")]
    failed = [of_site for of_site in numbers if not of_site.passed]
    worst = max(numbers, key=lambda of_site: max(of_site.difference, of_site.product) / of_site.allowed)
    detail = (
        f"{len(numbers) - len(failed)} of {len(numbers)} sites as the numpy reference, largest difference"
        f" {worst.difference:.2e}, of P V from the base's output {worst.product:.2e} (allowed {worst.allowed:.2e})"
    )
    if failed:
        others = ", ".join(of_site.site for of_site in failed if of_site.untouched is False)
        detail += f"; failed: {', '.join(of_site.site for of_site in failed)}"
        detail += f"; map or values not the base's own at {others}" if others else ""
    checks.append(Check(f"reference, {where}", not failed, detail))
    flagged = np.any([inner[site.flags].any(axis=1) for site in record.sites], axis=0)
    if any(site.parts == 0 for site in sites) and flagged.any():  # samples share a map, and what happens to it
        flagged = np.ones_like(flagged)
    checks.append(_unflagged(level.outputs, found, flagged, where))
    return checks, numbers


def _site_numbers(
    patched: ir.Model,
    record: PatchRecord,
    inner: dict[str, Array],
    emission: Emission,
    level: _Level,
    own: _Inside,
) -> Iterator[SiteNumbers]:
    fired = False
    for site in record.sites:
        values = site_values(patched, site, inner)
        untouched = None
        if not fired:
            untouched = _same_bits(inner[site.map], own.maps[site.site])
            untouched &= _same_bits(inner[site.values], own.values[site.site])
        fired |= bool(values.flags.any())
        difference, product, largest = _differences(values)
        yield SiteNumbers(
            site=site.site,
            emission=emission.value,
            optimized=level.optimize,
            columns=values.flags.size,
            flagged=int(values.flags.sum()),
            difference=difference,
            product=product,
            allowed=TOLERANCE[_dtype(inner[site.output])] * max(1.0, largest),
            untouched=untouched,
        )


def _differences(values: SiteValues) -> tuple[float, float, float]:
    """From the reference, of `P V` from Y, and the largest value; infinite where only one of two is finite."""
    reference = values.reference()
    largest = max(_largest(reference), _largest(values.Y))
    return _distance(values.corrected, reference), _distance(values.Y, attend(values.P, values.V)), largest


def _largest(array: NDArray[np.float64]) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Largest absolute difference; what is NaN or infinite in one must be so in the other."""
    finite = np.isfinite(one)
    if one.shape != other.shape or not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0))


def _unflagged(
    expected: Mapping[str, Array], found: Mapping[str, Array], flagged: NDArray[np.bool_], where: str
) -> Check:
    """Samples without a flag keep every output that has the samples on its first axis."""
    changed = []
    for name, array in expected.items():
        if array.shape != found[name].shape:
            changed.append(name)
        elif array.ndim and len(array) == len(flagged):
            pairs = zip(array, found[name], flagged, strict=True)
            if not all(has_flag or _same_bits(one, other) for one, other, has_flag in pairs):
                changed.append(name)
    unflagged = int((~flagged).sum())
    detail = f"{unflagged} of {len(flagged)} without a flag" + (f"; changed in {', '.join(changed)}" if changed else "")
    return Check(f"samples without a flag, {where}", not changed, detail)


def _stripped(patched: ir.Model, emission: Emission) -> Check:
    try:
        strip(patched)
    except AtPatchError as error:
        return Check(f"strip, {emission}", False, str(error))
    return Check(f"strip, {emission}", True, "gives the base back")


def _same_bits(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _finite(array: Array) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def _dtype(array: Array) -> str:
    return "FLOAT16" if array.dtype == np.float16 else "FLOAT"
