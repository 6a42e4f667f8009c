"""Commands that look for what nobody told: hunt in traffic, scan with clean inputs."""

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import atpatch_onnx as atp
from atpatch_onnx.cli import arguments as args
from atpatch_onnx.cli.paths import require_place
from atpatch_onnx.cli.printing import progress_bars, show
from atpatch_onnx.debugset.checks import pairs_needed
from atpatch_onnx.debugset.inputs import load_inputs
from atpatch_onnx.discovery.options import HuntOptions, ScanOptions
from atpatch_onnx.discovery.vocabulary import read_vocabulary
from atpatch_onnx.report import text
from atpatch_onnx.running.executors import executing

if TYPE_CHECKING:
    from atpatch_onnx.discovery.verdict import Search

ALARM = 3
"""Exit code where somebody should look: suspicious, or backdoored."""

Kind = Annotated[
    Literal["texts", "grids", "tables"] | None,
    typer.Option(help="What inputs are, if they do not tell: a table of whole numbers, say.", show_default=False),
]
Pairs = Annotated[Path, typer.Option("--out", "-o", help="The pairs to write, a .npz file.", show_default=False)]
Report = Annotated[Path | None, typer.Option(help="An HTML page to write.", show_default=False)]
Resume = Annotated[
    Path | None,
    typer.Option(help="A folder for finished pieces: a search that was stopped goes on.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what the search would cost.")]
FalseAlarms = Annotated[float, typer.Option(help="Probability of a false alarm, at most.")]
Wanted = Annotated[int, typer.Option("--pairs", min=1, help="Pairs to write, about.")]


def hunt(
    model: args.Model,
    traffic: Annotated[
        Path,
        typer.Argument(
            metavar="TRAFFIC", help="Inputs: a .npz file with an array each, or Parquet.", show_default=False
        ),
    ],
    out: Pairs,
    report: Report = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    false_alarms: FalseAlarms = HuntOptions.false_alarms,
    pairs: Wanted = HuntOptions.pairs,
    kind: Kind = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of texts: the model's tokenizer.json, for words.", show_default=False)
    ] = None,
    output: args.Output = None,
    batch_size: args.BatchSize = HuntOptions.batch_size,
    seed: args.Seed = 0,
    on: args.On = "local",
    workers: args.Workers = None,
    as_json: args.AsJson = False,
) -> None:
    """Look for a trigger in TRAFFIC: inputs without labels, of which some may have it. Exit code 3: found."""
    from atpatch_onnx.discovery import hunting

    _require_places([out, report], [model, traffic])
    options = HuntOptions(false_alarms, pairs, kind, output=output, batch_size=batch_size, seed=seed)
    if tokenizer is not None:
        vocabulary = read_vocabulary(tokenizer)
        options = replace(options, words=vocabulary.words, blank=vocabulary.blank)
    inputs = load_inputs(traffic)
    if dry_run:
        _show_cost(*hunting.cost(model, inputs, options), as_json)
        return
    with executing(on, workers=workers) as executor, progress_bars() as progress:
        found = atp.hunt(atp.load(model), inputs, options, finished=resume, executor=executor, progress=progress)
    _conclude(found, model, out, report, f"hunt in {traffic.name}", as_json)


def scan(
    model: args.Model,
    clean: Annotated[
        Path,
        typer.Argument(
            metavar="CLEAN", help="Clean inputs: a .npz file with an array each, or Parquet.", show_default=False
        ),
    ],
    out: Pairs,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of texts and prompts: the model's tokenizer.json.", show_default=False)
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Of tables: names of the columns, with commas.", show_default=False)
    ] = None,
    protected: Annotated[
        list[str] | None,
        typer.Option(help="Of tables: a column that predictions must not lean on.", show_default=False),
    ] = None,
    evolve: Annotated[
        bool, typer.Option(help="Of images: an evolutionary search where the dictionary finds nothing.")
    ] = True,
    report: Report = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    false_alarms: FalseAlarms = ScanOptions.false_alarms,
    pairs: Wanted = ScanOptions.pairs,
    kind: Annotated[
        Literal["texts", "grids", "tables", "prompts"] | None,
        typer.Option(
            help="What inputs are, if they do not tell; prompts: of a model without a cache.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of prompts: tokens of an answer to look at.")] = ScanOptions.steps,
    output: args.Output = None,
    batch_size: args.BatchSize = ScanOptions.batch_size,
    seed: args.Seed = 0,
    on: args.On = "local",
    workers: args.Workers = None,
    as_json: args.AsJson = False,
) -> None:
    """Look for a trigger with CLEAN inputs only, or for what a table's predictions lean on. Exit code 3: found."""
    from atpatch_onnx.discovery import scanning

    _require_places([out, report], [model, clean])
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer)
    options = ScanOptions(
        vocabulary=None if vocabulary is None else vocabulary.plain,
        words=None if vocabulary is None else vocabulary.words,
        columns=None if columns is None else tuple(columns.split(",")),
        protected=tuple(protected or ()),
        evolve=evolve,
        false_alarms=false_alarms,
        pairs=pairs,
        kind=kind,
        steps=steps,
        output=output,
        batch_size=batch_size,
        seed=seed,
    )
    inputs = load_inputs(clean)
    if dry_run:
        _show_cost(*scanning.cost(model, inputs, options), as_json)
        return
    with executing(on, workers=workers) as executor, progress_bars() as progress:
        found = atp.scan(atp.load(model), inputs, options, finished=resume, executor=executor, progress=progress)
    _conclude(found, model, out, report, f"scan with {clean.name}", as_json)


def _require_places(written: list[Path | None], read: list[Path]) -> None:
    for place in written:
        if place is not None:
            require_place(place, *read)


def _show_cost(inputs: int, passes: int, seconds: float, as_json: bool) -> None:
    shown = {"inputs": inputs, "passes": passes, "seconds": round(seconds, 1)}
    line = f"{inputs:,} inputs, about {passes:,} forward passes, {seconds / 60:.1f} minutes on this machine"
    show(shown, [line], as_json)


def _resolved(pairs: int) -> list[str]:
    """What a fit has to be told where so few pairs cannot resolve the clean flag rate that it allows by default."""
    quarter = pairs // 4 - 1  # the share of the calibration part, which rounding may make smaller
    needed = pairs_needed(atp.FitOptions().goal.clean_flag_rate)
    return [] if quarter >= needed else ["--clean-flag-rate", f"{math.ceil(1000 / max(quarter, 1)) / 1000:g}"]


def _conclude(found: "Search", model: Path, out: Path, report: Path | None, title: str, as_json: bool) -> None:
    """Write what was found and say it; the next command where there are pairs."""
    shown: dict[str, Any] = found.to_json()
    lines: list[Any] = [found.sentence, *text.search_tables(found), *(f"- {line}" for line in found.searched)]
    if report is not None:
        from atpatch_onnx.report.found import render_search
        from atpatch_onnx.report.html import write_report

        write_report(report, render_search(found, f"{model.name}: {title}"))
        lines.append(f"wrote {report}")
    if found.pairs is not None:
        found.pairs.save(out)
        command = ["atpatch", "fit", str(model), str(out), "-o", "fix.safetensors", *_resolved(len(found.pairs))]
        shown["next"] = shlex.join(command)
        lines += [f"wrote {out}", f"next: {shown['next']}"]
    show(shown, lines, as_json)
    if found.alarmed:
        raise typer.Exit(ALARM)
