"""Measure a patched model against its base on inputs that the fit never saw."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError, require
from atpatch_onnx.fitting.collect import anomalous_columns, input_specs
from atpatch_onnx.matching import batching
from atpatch_onnx.measuring.inspect import require_base, with_columns
from atpatch_onnx.measuring.sides import Side, Sides, run_sides
from atpatch_onnx.running.counted import Counts
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.executors import LOCAL, Executor, executing
from atpatch_onnx.running.groups import demographic_parity, equalized_odds
from atpatch_onnx.running.metrics import Difference, Rate, attack_above_floor, attack_success, flip_rate, infer_target
from atpatch_onnx.running.opening import Libraries, as_model
from atpatch_onnx.running.placement import placement
from atpatch_onnx.running.predictions import prediction_output
from atpatch_onnx.running.providers import Providers, on_cpu
from atpatch_onnx.running.sessions import Progress, silent

CURVE_POINTS = 200
"""Points kept of a precision-recall curve."""


@dataclass(frozen=True)
class Curve:
    """A precision-recall curve over thresholds."""

    precision: tuple[float, ...]
    recall: tuple[float, ...]
    average_precision: float


@dataclass(frozen=True)
class Detection:
    """How well anomalies are named, at one level: columns, or whole inputs."""

    precision: Rate
    recall: Rate
    curve: Curve


@dataclass(frozen=True)
class Backdoor:
    """What is left of an attack. Definitions: design section 2."""

    target: int
    asr_base: Rate
    asr_patched: Rate
    asr_floor: Rate
    asr_above_floor: Rate
    robust_accuracy_base: Rate
    robust_accuracy_patched: Rate
    robust_accuracy_lost: Difference
    """Accuracy of the base on clean inputs less that of the patched model on triggered ones, of the inputs whose
    label is not the target."""


@dataclass(frozen=True)
class Fairness:
    """What is left of leaning on a protected attribute."""

    uf_base: Rate
    """Share of inputs whose prediction changes with the attribute alone (UF)."""

    uf_patched: Rate
    confidence_gap_base: float
    """Mean largest change of a class's confidence over the same pairs."""

    confidence_gap_patched: float
    demographic_parity_difference_base: Difference | None
    """Only for two classes and a known attribute, like the next three; of equalized odds, only with true labels."""

    demographic_parity_difference_patched: Difference | None
    equalized_odds_difference_base: Difference | None
    equalized_odds_difference_patched: Difference | None


@dataclass(frozen=True)
class Evaluation:
    """Base against patched on one debug set."""

    inputs: int
    accuracy_base: Rate
    accuracy_patched: Rate
    accuracy_lost: Difference
    clean_flag_rate: Rate
    """Share of clean inputs with a flag on a benign column."""

    clean_changed: Rate
    """Share of clean inputs whose logits change at all."""

    clean_bit_identical: bool | None
    """Whether every clean input without a flag keeps its logits bit for bit; None where hidden units are edited, which
    no input escapes.
    """

    columns: Detection | None
    """None where the patch does not detect: neuron edits alone."""

    input_level: Detection | None
    backdoor: Backdoor | None
    fairness: Fairness | None

    ran: Mapping[str, Any] | None = None
    """How many nodes ran on which provider, of the patched model and of the patch; None where all did on the CPU."""

    labelled: bool = True
    """Whether the pairs have true labels; else the base's predictions on clean inputs stand in for them."""

    def __str__(self) -> str:
        """What it comes to, in a line of four figures; those of a backdoor or of a protected attribute."""
        points = f"accuracy lost {100 * self.accuracy_lost.value:+z.2f} points"
        if (attack := self.backdoor) is not None:
            left = f"ASR {attack.asr_base.value:.2%}, patched {attack.asr_above_floor.value:.2%} above floor"
            return f"{left}, {points}, clean inputs flagged {self.clean_flag_rate.value:.2%}"
        assert self.fairness is not None, "pairs are of a backdoor or of an attribute"
        left = f"UF {self.fairness.uf_base.value:.2%}, patched {self.fairness.uf_patched.value:.2%}"
        return f"{left}, {points}, clean inputs changed {self.clean_changed.value:.2%}"

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return asdict(self)


def evaluate(
    base: graphs.ModelOrPath,
    patched: graphs.ModelOrPath,
    debug: DebugSet,
    *,
    output: str | None = None,
    providers: Providers = ("cpu",),
    batch_size: int = 32,
    custom_ops: Libraries = (),
    executor: Executor | str = LOCAL,
    progress: Progress = silent,
) -> Evaluation:
    """Measure base and patched model on pairs that the fit never saw.

    Args:
        base: The model before, or its path.
        patched: The model after, or its path.
        debug: Pairs; where they have no labels, the base's own predictions on clean inputs stand in for them. The
            target of a backdoor, where it is not known, is inferred.
        output: Output that predictions are read from; None: the first float output `[batch, classes]`.
        providers: What is to run both, names of `running.providers.PROVIDERS`.
        batch_size: Inputs at a time.
        custom_ops: Libraries that operators of the model come from, as in `load`.
        executor: Who runs both: `local`, `ray`, `ray://HOST:PORT`, or an executor (see `running.executors`).
        progress: Told after every batch.

    Raises:
        DebugSetError: The debug set does not fit the model.
        UnbakeError: `patched` is not patched.
        PatchMismatchError: `base` is not the model that `patched` names.
        RunError: onnxruntime has no such provider, or it does not start.
        MissingExtraError: scikit-learn or fairlearn is not installed.
    """
    require("sklearn", "evaluate", "evaluating")
    require("fairlearn", "evaluate", "evaluating")
    base, patched = as_model(base, custom_ops), as_model(patched, custom_ops)
    if debug.kind == "generation":
        raise DebugSetError(
            "the evaluation set",
            expected="inputs that are classified",
            found="prompts of a language model",
            advice="Measure what it writes, with evaluate_prompts.",
        )
    debug.check_inputs(input_specs(base))
    output = prediction_output(base, output, batching(base))
    record = read_record(patched)
    require_base(base, record)
    with executing(executor) as runs:
        how: dict[str, Any] = {"batch_size": batch_size, "executor": runs, "progress": progress}
        if record.detects:
            debug = with_columns(base, patched, record, debug, **how)
        sides = run_sides(base, patched, record, debug, output, providers=providers, **how)
    found = _evaluation(debug, sides, edits=bool(record.layers))
    if on_cpu(providers):
        return found
    where = placement(patched, draw_inputs(patched, np.random.default_rng(0)), providers)
    return replace(found, ran=where.to_json())


def _evaluation(debug: DebugSet, sides: Sides, *, edits: bool) -> Evaluation:
    clean, other = sides.clean, sides.other
    labels = clean.base if debug.labels is None else debug.labels
    right_before, right_after = (predicted == labels for predicted in (clean.base, clean.patched))
    flagged, same = np.any(clean.flags, axis=1), clean.same
    detects = clean.flags.shape[1] > 0
    anomalous = anomalous_columns(debug) if detects else (clean.flags, other.flags)
    wanted, flags = np.concatenate(anomalous), np.concatenate([clean.flags, other.flags])
    columns = inputs = None
    if detects:
        columns = _detection(wanted, flags, _curve_of_counts(sides.scores))
        of_inputs, largest = np.any(wanted, axis=1), np.concatenate([clean.largest, other.largest])
        inputs = _detection(of_inputs, np.any(flags, axis=1), _curve(of_inputs, largest))
    return Evaluation(
        inputs=len(debug),
        accuracy_base=Rate.of(right_before),
        accuracy_patched=Rate.of(right_after),
        accuracy_lost=Difference.paired(right_before, right_after),
        clean_flag_rate=Rate.of(np.any(clean.flags & ~anomalous[0], axis=1)),
        clean_changed=Rate.of(~same),
        clean_bit_identical=None if edits else bool(same[~flagged].all()),
        columns=columns,
        input_level=inputs,
        backdoor=_backdoor(debug, labels, clean, other) if debug.kind == "backdoor" else None,
        fairness=_fairness(debug, labels, sides) if debug.kind == "attribute" else None,
        labelled=debug.labels is not None,
    )


def _detection(wanted: NDArray[np.bool_], flags: NDArray[np.bool_], curve: Curve) -> Detection:
    return Detection(precision=Rate.of(wanted[flags]), recall=Rate.of(flags[wanted]), curve=curve)


def _curve(
    wanted: NDArray[np.bool_], scores: NDArray[np.floating[Any]], counts: NDArray[np.int64] | None = None
) -> Curve:
    """The curve of scores, each of which stands for as many as `counts` says, or for one."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(wanted, scores, sample_weight=counts, drop_intermediate=True)
    keep = np.unique(np.linspace(0, len(precision) - 1, CURVE_POINTS).astype(int))
    return Curve(
        precision=tuple(float(value) for value in precision[keep]),
        recall=tuple(float(value) for value in recall[keep]),
        average_precision=float(average_precision_score(wanted, scores, sample_weight=counts)),
    )


def _curve_of_counts(found: Counts) -> Curve:
    wanted = np.repeat([True, False], len(found.scores))
    return _curve(wanted, np.tile(found.scores, 2), np.concatenate([found.wanted, found.others]))


def _backdoor(debug: DebugSet, labels: NDArray[np.int64], clean: Side, other: Side) -> Backdoor:
    before, triggered = clean.base, other.base
    target = infer_target(before, triggered) if debug.target is None else debug.target
    if target is None:
        raise DebugSetError(
            "the evaluation set",
            expected="the backdoor's target class",
            found="none named, and changed predictions that go to several classes",
            advice="Name it: DebugSet.with_target(class), or --target-class.",
        )
    repaired, others = other.patched, labels != target
    return Backdoor(
        target=target,
        asr_base=attack_success(triggered, labels, target),
        asr_patched=attack_success(repaired, labels, target),
        asr_floor=attack_success(before, labels, target),
        asr_above_floor=attack_above_floor(repaired, labels, before, target),
        robust_accuracy_base=Rate.of(triggered == labels),
        robust_accuracy_patched=Rate.of(repaired == labels),
        robust_accuracy_lost=Difference.paired((before == labels)[others], (repaired == labels)[others]),
    )


def _fairness(debug: DebugSet, labels: NDArray[np.int64], sides: Sides) -> Fairness:
    clean, other = sides.clean, sides.other
    before, after = (clean.base, other.base), (clean.patched, other.patched)
    assert sides.gaps is not None, "they are of an attribute"
    binary = all(set(np.unique(c)) <= {0, 1} for c in (labels, before[0], after[0]))
    groups = {
        f"{metric.__name__}_difference_{name}": metric(labels, predictions, debug.sensitive)
        if binary and debug.sensitive is not None and (debug.labels is not None or metric is demographic_parity)
        else None
        for metric in (demographic_parity, equalized_odds)
        for name, predictions in (("base", before[0]), ("patched", after[0]))
    }
    return Fairness(
        uf_base=flip_rate(*before),
        uf_patched=flip_rate(*after),
        confidence_gap_base=float(sides.gaps[0].mean()),
        confidence_gap_patched=float(sides.gaps[1].mean()),
        **groups,
    )
