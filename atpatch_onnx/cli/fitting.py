"""Commands that make a patch: look at the model, fit, isolate, repair, or try everything."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

import atpatch_onnx as atp
from atpatch_onnx.cli import arguments as args
from atpatch_onnx.cli.paths import make_folder, require_place
from atpatch_onnx.cli.printing import atpatch, progress_bars, show
from atpatch_onnx.cli.walking import after_sites
from atpatch_onnx.errors import FitError
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.report import text
from atpatch_onnx.report.summary import patchable
from atpatch_onnx.running.executors import executing


def sites(
    model: args.Model,
    why: Annotated[bool, typer.Option("--why", help="Name the values and nodes of each site as well.")] = False,
    custom_ops: args.CustomOps = None,
    as_json: args.AsJson = False,
) -> None:
    """List the attention sites of a model, what was refused, and its hidden layers."""
    loaded = atp.load(model, custom_ops=custom_ops or ())
    matches, layers = atp.explain(loaded), find_hidden_layers(loaded)
    tables = [text.sites_table(matches, why), text.near_misses_table(matches), text.layers_table(layers)]
    shown = {**matches.to_json(), "hidden_layers": [layer.to_json() for layer in layers]}
    show(shown, [patchable(str(model), matches, layers), *tables], as_json, then=after_sites(model, loaded, matches))


def fit(
    model: args.Model,
    data: args.Data,
    out: args.Out,
    asr_above_floor: args.AsrGoal = Goal.asr_above_floor,
    flip_rate: args.FlipGoal = Goal.flip_rate,
    accuracy_loss: args.AccuracyGoal = Goal.accuracy_loss,
    clean_flag_rate: args.FlagGoal = Goal.clean_flag_rate,
    robust_accuracy_loss: args.RobustGoal = Goal.robust_accuracy_loss,
    columns_missed: Annotated[
        float,
        typer.Option(help="Share of anomalous columns that are not flagged.", rich_help_panel=args.GOAL),
    ] = Goal.columns_missed,
    flags_per_million: args.TokenFlagGoal = None,
    thresholds: args.Thresholds = None,
    redistribute: args.Redistribute = "needed",
    always: args.Always = False,
    prefer_few: Annotated[
        bool,
        typer.Option(
            "--prefer-few",
            help="Go on for a set of sites that adds fewer kernels to a run.",
            rich_help_panel=args.EXPERT,
        ),
    ] = False,
    after: Annotated[
        list[Path] | None,
        typer.Option(help="A patch of hidden units that is to be baked before this one.", show_default=False),
    ] = None,
    output: args.Output = None,
    steps: args.Steps = atp.FitOptions.steps,
    batch_size: args.BatchSize = 32,
    seed: args.Seed = 0,
    force: args.Force = False,
    custom_ops: args.CustomOps = None,
    on: args.On = "local",
    workers: args.Workers = None,
    resume: args.Pieces = None,
    as_json: args.AsJson = False,
) -> None:
    """Fit a patch for MODEL on the pairs of DATA."""
    options = atp.FitOptions(
        goal=Goal(
            asr_above_floor,
            flip_rate,
            accuracy_loss,
            clean_flag_rate,
            robust_accuracy_loss,
            columns_missed,
            flags_per_million,
        ),
        thresholds=thresholds,
        redistribute=redistribute,
        always=always,
        prefer_few=prefer_few,
        output=output,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        force=force,
    )
    require_place(out, model, data, *(after or []))
    before = [atp.Patch.load(path) for path in after or []]
    then = atpatch("bake", model, *(after or []), out, "-o", "patched.onnx")
    with executing(on, workers=workers, resume=resume) as executor:
        make = partial(atp.fit, options=options, after=before, executor=executor)
        _make(make, model, data, out, text.fit_table, as_json, then, custom_ops)


def isolate(
    model: args.Model,
    data: args.Data,
    out: args.Out,
    asr_above_floor: args.AsrGoal = Goal.asr_above_floor,
    flip_rate: args.FlipGoal = Goal.flip_rate,
    accuracy_loss: args.AccuracyGoal = Goal.accuracy_loss,
    most: Annotated[
        int, typer.Option(help="At most so many hidden units are frozen.", rich_help_panel=args.EXPERT)
    ] = 20,
    epsilon: Annotated[
        float,
        typer.Option(help="Probability that a slot is drawn from lower ranks.", rich_help_panel=args.EXPERT),
    ] = 0.0,
    candidates: args.Candidates = 512,
    inputs: args.RankedOn = 128,
    output: args.Output = None,
    batch_size: args.BatchSize = 32,
    seed: args.Seed = 0,
    force: args.Force = False,
    custom_ops: args.CustomOps = None,
    as_json: args.AsJson = False,
) -> None:
    """Find the guilty hidden units of MODEL and freeze them (IDNN)."""
    from atpatch_onnx import neurons

    require_place(out, model, data)
    options = neurons.IsolationOptions(
        goal=Goal(asr_above_floor, flip_rate, accuracy_loss),
        most=most,
        epsilon=epsilon,
        candidates=candidates or None,
        inputs=inputs,
        output=output,
        batch_size=batch_size,
        seed=seed,
        force=force,
    )
    then = atpatch("bake", model, out, "-o", "patched.onnx")
    _make(partial(neurons.isolate, options=options), model, data, out, text.edits_table, as_json, then, custom_ops)


def repair(
    model: args.Model,
    data: args.Data,
    out: args.Out,
    asr_above_floor: args.AsrGoal = Goal.asr_above_floor,
    flip_rate: args.FlipGoal = Goal.flip_rate,
    accuracy_loss: args.AccuracyGoal = Goal.accuracy_loss,
    units: Annotated[
        list[int] | None,
        typer.Option(
            help="How many hidden units are scaled; several to try. 3 for an attribute, 5 for a backdoor.",
            rich_help_panel=args.EXPERT,
        ),
    ] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="Weight of the accuracy; several to try. 0.3, 0.1 for a backdoor.", rich_help_panel=args.EXPERT
        ),
    ] = None,
    optimizer: Annotated[
        Literal["swarm", "evolution"],
        typer.Option(help="Particle swarm, or differential evolution.", rich_help_panel=args.EXPERT),
    ] = "swarm",
    candidates: args.Candidates = 512,
    inputs: args.RankedOn = 128,
    output: args.Output = None,
    batch_size: args.BatchSize = 32,
    seed: args.Seed = 0,
    force: args.Force = False,
    custom_ops: args.CustomOps = None,
    as_json: args.AsJson = False,
) -> None:
    """Find the guilty hidden units of MODEL by their causal effect and scale them (CARE)."""
    from atpatch_onnx import neurons

    require_place(out, model, data)
    options = neurons.RepairOptions(
        goal=Goal(asr_above_floor, flip_rate, accuracy_loss),
        units=tuple(units) if units else None,
        alpha=tuple(alpha) if alpha else None,
        optimizer=optimizer,
        candidates=candidates or None,
        inputs=inputs,
        output=output,
        batch_size=batch_size,
        seed=seed,
        force=force,
    )
    then = atpatch("bake", model, out, "-o", "patched.onnx")
    _make(partial(neurons.repair, options=options), model, data, out, text.edits_table, as_json, then, custom_ops)


def _make(
    make: Callable[..., atp.Patch],
    model: Path,
    data: Path,
    out: Path,
    table: Callable[[atp.Patch], Table],
    as_json: bool,
    then: str,
    custom_ops: list[Path] | None,
) -> None:
    """Make a patch of MODEL and DATA, write it and show it."""
    with progress_bars() as progress:
        patch = make(atp.load(model, custom_ops=custom_ops or ()), atp.DebugSet.load(data), progress=progress)
    patch.save(out)
    shown = {"patch": patch.id, "base": patch.base, "file": str(out), "figures": dict(patch.figures)}
    show(shown, [table(patch), text.fit_summary(patch), f"wrote {out} (patch {patch.id})"], as_json, then=then)


def compare(
    model: args.Model,
    data: args.Data,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for all patches.", show_default=False)
    ] = None,
    asr_above_floor: args.AsrGoal = Goal.asr_above_floor,
    flip_rate: args.FlipGoal = Goal.flip_rate,
    accuracy_loss: args.AccuracyGoal = Goal.accuracy_loss,
    clean_flag_rate: args.FlagGoal = Goal.clean_flag_rate,
    output: args.Output = None,
    batch_size: args.BatchSize = 32,
    seed: args.Seed = 0,
    custom_ops: args.CustomOps = None,
    as_json: args.AsJson = False,
) -> None:
    """Try every fix for MODEL, measure them on pairs held out of DATA, and recommend one."""
    goal = Goal(asr_above_floor, flip_rate, accuracy_loss, clean_flag_rate)
    options = atp.FitOptions(goal=goal, output=output, batch_size=batch_size, seed=seed)
    if out is not None:
        make_folder(out)
    with progress_bars() as progress:
        loaded = atp.load(model, custom_ops=custom_ops or ())
        ladder = atp.compare(loaded, atp.DebugSet.load(data), options, progress=progress)
    shown = ladder.to_json()
    lines: list[Any] = [text.ladder_table(ladder)]
    if out is not None:
        shown["files"] = {fix.name: [_patch_file(out, patch) for patch in fix.patches] for fix in ladder.fixes}
        lines += [f"{name}: {' '.join(files)}" for name, files in shown["files"].items() if files]
    best = ladder.recommended
    recommended = ["PATCH"] if best is None or out is None else shown["files"][best.name]
    then = None if best is None else atpatch("bake", model, *recommended, "-o", "patched.onnx")
    show(shown, lines, as_json, then=then)
    if best is None:
        raise FitError(
            str(model), expected="at least one fix", found=ladder.reason, advice="See above why there is none."
        )


def _patch_file(folder: Path, patch: atp.Patch) -> str:
    """Write a patch under its id; its name."""
    path = folder / f"{patch.figures.get('method', 'attention')}-{patch.id}.safetensors"
    patch.save(path)
    return str(path)
