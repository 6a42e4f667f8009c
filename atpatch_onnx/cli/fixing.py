"""The command that goes the whole way: fit, bake, verify, evaluate on pairs held out, report."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

import atpatch_onnx as atp
from atpatch_onnx import graph as graphs
from atpatch_onnx.cli import arguments as args
from atpatch_onnx.cli.paths import require_place
from atpatch_onnx.cli.printing import atpatch, progress_bars, require_passed, show
from atpatch_onnx.errors import DebugSetError
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.report import text
from atpatch_onnx.report.rows import standing_in
from atpatch_onnx.report.summary import numbers_json, numbers_table, of_pairs, of_prompts
from atpatch_onnx.report.verdict import needless

VERIFIED = 1_000
"""Held-out pairs that are verified at most: each is run six times a side."""


def fix(
    model: args.Model,
    data: args.Data,
    out: args.Out,
    unseen: Annotated[
        Path | None,
        typer.Option(help="Pairs to evaluate on; a quarter of DATA is held out by default.", show_default=False),
    ] = None,
    target: args.Target = "cpu",
    asr_above_floor: args.AsrGoal = Goal.asr_above_floor,
    flip_rate: args.FlipGoal = Goal.flip_rate,
    robust_accuracy_loss: args.RobustGoal = Goal.robust_accuracy_loss,
    accuracy_loss: args.AccuracyGoal = Goal.accuracy_loss,
    clean_flag_rate: args.FlagGoal = Goal.clean_flag_rate,
    flags_per_million: args.TokenFlagGoal = None,
    thresholds: args.Thresholds = None,
    redistribute: args.Redistribute = "needed",
    always: args.Always = False,
    external: args.ExternalData = None,
    output: args.Output = None,
    steps: args.Steps = atp.FitOptions.steps,
    batch_size: args.BatchSize = 32,
    seed: args.Seed = 0,
    force: args.Force = False,
    as_json: args.AsJson = False,
) -> None:
    """Fix MODEL with the pairs of DATA, whole: fit, bake, verify, evaluate on pairs held out, report.

    Beside the patched model, the patch (.safetensors) and the report (.html) get its name.
    """
    patch_file, report_file = out.with_suffix(".safetensors"), out.with_suffix(".html")
    read = (model, data, *([] if unseen is None else [unseen]))
    for place in (out, patch_file, report_file):
        require_place(place, *read)
    options = atp.FitOptions(
        goal=Goal(
            asr_above_floor=asr_above_floor,
            flip_rate=flip_rate,
            accuracy_loss=accuracy_loss,
            clean_flag_rate=clean_flag_rate,
            robust_accuracy_loss=robust_accuracy_loss,
            flags_per_million=flags_per_million,
        ),
        thresholds=thresholds,
        redistribute=redistribute,
        always=always,
        output=output,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        force=force,
    )
    base, (known, others) = atp.load(model), _parts(data, unseen, seed)
    run: dict[str, Any] = {"steps": steps, "batch_size": batch_size}
    with progress_bars() as progress:
        patch = _fitted(base, known, options, progress, held_out=unseen is None)
        patched = atp.bake(base, patch, target=target)
        patch.save(patch_file)
        atp.save(patched, out, external=external)
        if others.target is None and (found := patch.figures.get("target")) is not None:
            others = others.with_target(int(found))
        some = others.take(range(min(len(others), VERIFIED)))
        verification = atp.verify(model, out, some, patch=patch, progress=progress, **run)
        evaluation = None
        if others.kind == "generation":
            numbers = of_prompts(atp.evaluate_prompts(model, out, others, seed=seed, progress=progress, **run))
        else:
            evaluation = atp.evaluate(model, out, others, output=output, batch_size=batch_size, progress=progress)
            numbers = of_pairs(evaluation)
    written = {"patched": str(out), "patch": str(patch_file)}
    missing = _no_report(others)
    if missing is None:
        from atpatch_onnx.measuring.examples import gather_examples
        from atpatch_onnx.report import html

        page = html.render_html(
            title=f"AtPatch: {model.name}",
            patch=patch,
            evaluation=evaluation,
            verification=verification,
            examples=gather_examples(model, out, others, output=output),
        )
        html.write_report(report_file, page)
        written["report"] = str(report_file)
    shown = {**written, "verified": verification.passed, "pairs": len(others), "numbers": numbers_json(numbers)}
    lines: list[RenderableType] = [
        f"wrote {', '.join(written.values())}" + (f"; no report: {missing}" if missing else ""),
        f"verified: all {len(verification.checks)} checks passed"
        if verification.passed
        else text.verification_table(verification),
        *needless(patch.figures),
        numbers_table(numbers, len(others), "" if evaluation is None else standing_in(evaluation)),
    ]
    then = atpatch("benchmark", model, out) if verification.passed else None
    show(shown, lines, as_json, then=then)
    require_passed(out, verification, "Do not ship this file.")


def _fitted(
    base: graphs.Model, known: atp.DebugSet, options: atp.FitOptions, progress: Any, *, held_out: bool
) -> atp.Patch:
    """The patch; what a fit says of too few pairs is said of those that were not held out."""
    try:
        return atp.fit(base, known, options, progress=progress)
    except DebugSetError as error:
        if not held_out:
            raise
        advice = f"{error.advice} The whole set of this fit is DATA without the quarter that is held out (--unseen)."
        raise DebugSetError(error.where, expected=error.expected, found=error.found, advice=advice) from error


def _parts(data: Path, unseen: Path | None, seed: int) -> tuple[atp.DebugSet, atp.DebugSet]:
    """Pairs for the fit, and pairs to evaluate on."""
    from atpatch_onnx.measuring.compare import held_out

    pairs = atp.DebugSet.load(data)
    return held_out(pairs, seed) if unseen is None else (pairs, atp.DebugSet.load(unseen))


def _no_report(others: atp.DebugSet) -> str | None:
    """Why no report is written; None where one is."""
    if others.kind == "generation":
        return "there is none for prompts"
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed (pip install 'atpatch-onnx[report]')" if missing else None
