"""What comes before a fit: the candidate sites, and the debug set checked, completed and split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx.debugset import DebugSet, Split
from atpatch_onnx.debugset.checks import check_effect, check_size
from atpatch_onnx.errors import DebugSetError, FitError, NoSiteError
from atpatch_onnx.fitting.collect import find_suspects, input_specs
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.matching import batching, find_sites
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.executors import LOCAL, Executor, Kept
from atpatch_onnx.running.metrics import infer_target
from atpatch_onnx.running.predictions import classes, prediction_output
from atpatch_onnx.running.sessions import Progress, Session, joined, silent
from atpatch_onnx.running.shards import Groups, SpreadSession


@dataclass(frozen=True, eq=False)
class Prepared:
    """A debug set that fits its model, split, and the sites that may be patched."""

    sites: tuple[AttentionSite, ...]
    """The candidates, on one token axis, in the order of the graph."""

    left_out: tuple[AttentionSite, ...]
    """The sites that nobody asked for by name and that are no candidates, as they are on other token axes."""

    debug: DebugSet
    """With its suspects and, for a backdoor, its target."""

    parts: Split
    output: str
    """Name of the output that predictions are read from."""


def prepare(
    model: ir.Model,
    debug: DebugSet,
    options: FitOptions,
    progress: Progress = silent,
    executor: Executor = LOCAL,
) -> Prepared:
    """Check the debug set against the model, find its target and, at the axis's first site, its suspects; split it.

    Raises:
        NoSiteError: The model has no attention site that can be patched, or none of the name asked for.
        DebugSetError: The debug set does not fit the model, is too small, or shows no effect.
        FitError: A backdoor's target class cannot be inferred, sites of several token axes are asked for, or a fix is
            to be always on where inputs differ in length.
    """
    found = find_sites(model)
    sites = candidates(found, options)
    first = next(site for site in found if site.token_axis == sites[0].token_axis)
    if options.always:
        _require_same_places(first)
    run: dict[str, Any] = {"batch_size": options.batch_size, "executor": executor, "progress": progress}
    debug, output = complete(model, debug, output=options.output, effect=not options.always, **run)
    debug = find_suspects(model, [first], debug, always=options.always, **run)
    parts = debug.split(seed=options.seed)
    if not options.always:  # which is calibrated to nothing
        check_size(len(parts.calibration), len(debug), options.goal.clean_flag_rate)
    left_out = tuple(site for site in found if site not in sites) if options.sites is None else ()
    return Prepared(sites, left_out, debug, parts, output)


def _require_same_places(site: AttentionSite) -> None:
    """Refuse tokens that do not stand at the same places in every input."""
    if isinstance(site.keys, int) and site.parts == 1:
        return
    raise FitError(
        f"site {site.name}",
        expected="the same number of tokens in every input, as a fix that is always on names them by their places",
        found="as many as the input has" if site.parts == 1 else "tokens in several parts that attend on their own",
        advice="Fit detectors instead, without the option always.",
    )


def complete(
    model: ir.Model,
    debug: DebugSet,
    *,
    output: str | None,
    batch_size: int,
    effect: bool = True,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> tuple[DebugSet, str]:
    """Check the debug set against the model and find its target; the set with that, and the output of predictions.

    Raises:
        DebugSetError: The debug set does not fit the model, or shows no `effect`, where that is asked for.
        FitError: A backdoor's target class cannot be inferred.
    """
    debug.check_inputs(input_specs(model))
    where = batching(model)
    output = prediction_output(model, output, where)
    session = SpreadSession(model, executor=executor, batching=where)
    run: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    found = [
        joined(session.keep(_Predicting(output), {"inputs": inputs}, stage=f"predicting, {side} inputs", **run))
        for side, inputs in (("clean", debug.clean), ("counterfactual", debug.counterfactual))
    ]
    _check_classes(debug, max(int(found[0]["width"][0]), 2))
    clean, counterfactual = (side["classes"] for side in found)
    if effect:
        check_effect(clean, counterfactual, pairs=len(debug), attribute=debug.kind == "attribute")
    if debug.kind == "backdoor" and debug.target is None:
        target = infer_target(clean, counterfactual)
        if target is None:
            raise FitError(
                "the debug set",
                expected="a backdoor that sends changed predictions to one class",
                found="changed predictions that go to several",
                advice="Name the target class, or use kind='attribute' for a protected attribute.",
            )
        debug = debug.with_target(target)
    return debug, output


@dataclass(frozen=True)
class _Predicting:
    """The class of each input, and how many there are."""

    output: str

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        logits = sessions[0].batch(batch["inputs"], [self.output])[self.output]
        return {"classes": classes(logits), "width": np.array([logits.shape[-1]])}


def _check_classes(debug: DebugSet, count: int) -> None:
    """Refuse labels and targets that the model has no logit for."""
    named = [] if debug.labels is None else [("labels", int(debug.labels.max()))]
    named += [] if debug.target is None else [("target", debug.target)]
    for name, largest in named:
        if largest >= count:
            raise DebugSetError(
                f"the {name} of the debug set",
                expected=f"classes of the model, 0 to {count - 1}",
                found=str(largest),
                advice="Number classes as the model's output does.",
            )


def candidates(found: Sequence[AttentionSite], options: FitOptions) -> tuple[AttentionSite, ...]:
    """The sites that may be patched: those asked for, else all on the token axis of the first."""
    if not found:
        raise NoSiteError(
            "the model",
            expected="at least one attention site",
            found="none that can be patched",
            advice="See why with: atpatch sites MODEL --why",
        )
    if options.sites is None:
        return tuple(site for site in found if site.token_axis == found[0].token_axis)
    names = {site.name for site in found}
    unknown = [name for name in options.sites if name not in names]
    if unknown or not options.sites:
        raise NoSiteError(
            f"site {unknown[0]!r}" if unknown else "option sites",
            expected=f"one of {', '.join(sorted(names))}",
            found="no site of this name" if unknown else "none named",
            advice="List them with: atpatch sites MODEL",
        )
    sites = tuple(site for site in found if site.name in options.sites)
    if len({site.token_axis for site in sites}) > 1:
        raise FitError(
            "option sites",
            expected="sites of one token axis, since flags are carried along it",
            found=", ".join(f"{site.name} on {site.token_axis}" for site in sites),
            advice="Fit one patch for the sites of one axis.",
        )
    return sites
