"""The command line: thin commands over the functions of the same name, one error handler."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

import atpatch_onnx as atp
from atpatch_onnx.errors import AtPatchError, FitError, PatchFileError, VerificationError
from atpatch_onnx.goal import Goal
from atpatch_onnx.graph import External
from atpatch_onnx.metadata import read_record
from atpatch_onnx.patch import Features
from atpatch_onnx.report import text

if TYPE_CHECKING:
    from atpatch_onnx.runtime import Progress

TARGETS = ("cpu", "cuda", "tensorrt", "directml", "coreml", "web", "openvino", "portable")
"""The keys of `atpatch_onnx.TARGETS`, and below the values of `Emission`, here so that help needs no onnxscript."""

app = typer.Typer(
    help="Bake a hot-fix for a backdoored or unfair transformer into its own ONNX graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The base, an .onnx file.", show_default=False)]
Base = Annotated[Path, typer.Argument(metavar="BASE", help="The base, an .onnx file.", show_default=False)]
Patched = Annotated[Path, typer.Argument(metavar="PATCHED", help="The patched .onnx file.", show_default=False)]
Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="A debug set: .npz, or a folder of .npy.", show_default=False)
]
Patches = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATCH...", help="The patch, a .safetensors file; or several, in order.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
Output = Annotated[str | None, typer.Option(help="The model's output with the logits.", show_default=False)]
ExternalData = Annotated[
    External | None,
    typer.Option(
        "--external",
        help="Data files that lie elsewhere: leave them there (at or below the new file), clone or hard-link, or copy "
        "them. By default those that can stay do, and others are copied.",
        show_default=False,
    ),
]
AsrGoal = Annotated[float, typer.Option("--asr-above-floor", help="Goal: ASR above floor, a share.")]
FlipGoal = Annotated[float, typer.Option("--flip-rate", help="Goal for an attribute: flip rate, a share.")]
AccuracyGoal = Annotated[float, typer.Option("--accuracy-loss", help="Goal: accuracy lost, a share.")]
FlagGoal = Annotated[
    float, typer.Option("--clean-flag-rate", help="Budget: share of clean inputs that may be flagged.")
]
Candidates = Annotated[
    int, typer.Option(min=0, help="Hidden units that are tried one by one, those that differ most; 0: all.")
]
RankedOn = Annotated[int, typer.Option(min=1, help="Pairs that hidden units are ranked on.")]
Seed = Annotated[int, typer.Option(help="Same seed, same patch.")]
Force = Annotated[bool, typer.Option("--force", help="Write a patch that misses its goal, marked so.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs at a time, where the model leaves it free.")]


@app.command()
def sites(
    model: Model,
    why: Annotated[bool, typer.Option("--why", help="Name the values and nodes of each site as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the attention sites of a model, what was refused, and its hidden layers."""
    loaded = atp.load(model)
    matches, layers = atp.explain(loaded), atp.find_hidden_layers(loaded)
    tables = [text.sites_table(matches, why), text.near_misses_table(matches), text.layers_table(layers)]
    _show({**matches.to_json(), "hidden_layers": [layer.to_json() for layer in layers]}, tables, as_json)


@app.command()
def fit(
    model: Model,
    data: Data,
    out: Out,
    asr_above_floor: AsrGoal = Goal.asr_above_floor,
    flip_rate: FlipGoal = Goal.flip_rate,
    accuracy_loss: AccuracyGoal = Goal.accuracy_loss,
    clean_flag_rate: FlagGoal = Goal.clean_flag_rate,
    columns_missed: Annotated[
        float, typer.Option(help="Goal: share of anomalous columns that are not flagged.")
    ] = Goal.columns_missed,
    value: Annotated[Literal["neutral", "own"], typer.Option(help="What a flagged token hands over.")] = "neutral",
    thresholds: Annotated[
        Literal["balanced", "lowest"], typer.Option(help="Where they lie; lowest: for pairs of an inverted trigger.")
    ] = "balanced",
    features: Annotated[
        Features | None,
        typer.Option(help="What detectors read of a map; the map's own kind and size decide.", show_default=False),
    ] = None,
    redistribute: Annotated[
        Literal["needed", "all"], typer.Option(help="Which sites do; all: for flip rates that few pairs cannot show.")
    ] = "needed",
    decision: Annotated[
        Literal["alone", "joint"] | None,
        typer.Option(help="Whether sites decide alone or together; joint where alone misses.", show_default=False),
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="Candidate sites by name; all by default.")] = None,
    after: Annotated[
        list[Path] | None,
        typer.Option(help="A patch of hidden units that is to be baked before this one.", show_default=False),
    ] = None,
    output: Output = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fit a patch for MODEL on the pairs of DATA."""
    options = atp.FitOptions(
        goal=Goal(asr_above_floor, flip_rate, accuracy_loss, clean_flag_rate, columns_missed),
        value=value,
        thresholds=thresholds,
        redistribute=redistribute,
        decisions=(decision,) if decision else atp.FitOptions.decisions,
        features=features,
        sites=tuple(site) if site else None,
        output=output,
        batch_size=batch_size,
        seed=seed,
        force=force,
    )
    _require_folder(out)
    with progress_bars() as progress:
        before = [atp.Patch.load(path) for path in after or []]
        patch = atp.fit(atp.load(model), atp.DebugSet.load(data), options, after=before, progress=progress)
    patch.save(out)
    shown = {"patch": patch.id, "base": patch.base, "file": str(out), "figures": dict(patch.figures)}
    _show(shown, [text.fit_table(patch), text.fit_summary(patch), f"wrote {out} (patch {patch.id})"], as_json)


@app.command()
def isolate(
    model: Model,
    data: Data,
    out: Out,
    asr_above_floor: AsrGoal = Goal.asr_above_floor,
    flip_rate: FlipGoal = Goal.flip_rate,
    accuracy_loss: AccuracyGoal = Goal.accuracy_loss,
    most: Annotated[int, typer.Option(help="At most so many hidden units are frozen.")] = 20,
    epsilon: Annotated[float, typer.Option(help="Probability that a slot is drawn from lower ranks.")] = 0.0,
    candidates: Candidates = 512,
    inputs: RankedOn = 128,
    output: Output = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find the guilty hidden units of MODEL and freeze them (IDNN)."""
    _require_folder(out)
    options = atp.IsolationOptions(
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
    with progress_bars() as progress:
        patch = atp.isolate(atp.load(model), atp.DebugSet.load(data), options, progress=progress)
    _save_edits(patch, out, as_json)


@app.command()
def repair(
    model: Model,
    data: Data,
    out: Out,
    asr_above_floor: AsrGoal = Goal.asr_above_floor,
    flip_rate: FlipGoal = Goal.flip_rate,
    accuracy_loss: AccuracyGoal = Goal.accuracy_loss,
    units: Annotated[
        list[int] | None,
        typer.Option(help="How many hidden units are scaled; several to try. 3 for an attribute, 5 for a backdoor."),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Weight of the accuracy; several to try. 0.3, 0.1 for a backdoor.")
    ] = None,
    optimizer: Annotated[
        Literal["swarm", "evolution"], typer.Option(help="Particle swarm, or differential evolution.")
    ] = "swarm",
    candidates: Candidates = 512,
    inputs: RankedOn = 128,
    output: Output = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find the guilty hidden units of MODEL by their causal effect and scale them (CARE)."""
    _require_folder(out)
    options = atp.RepairOptions(
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
    with progress_bars() as progress:
        patch = atp.repair(atp.load(model), atp.DebugSet.load(data), options, progress=progress)
    _save_edits(patch, out, as_json)


def _save_edits(patch: atp.Patch, out: Path, as_json: bool) -> None:
    patch.save(out)
    shown = {"patch": patch.id, "base": patch.base, "file": str(out), "figures": dict(patch.figures)}
    _show(shown, [text.edits_table(patch), text.fit_summary(patch), f"wrote {out} (patch {patch.id})"], as_json)


@app.command()
def debug(
    model: Model,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for all patches.", show_default=False)
    ] = None,
    asr_above_floor: AsrGoal = Goal.asr_above_floor,
    flip_rate: FlipGoal = Goal.flip_rate,
    accuracy_loss: AccuracyGoal = Goal.accuracy_loss,
    clean_flag_rate: FlagGoal = Goal.clean_flag_rate,
    output: Output = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Try every fix for MODEL, measure them on pairs held out of DATA, and recommend one."""
    goal = Goal(asr_above_floor, flip_rate, accuracy_loss, clean_flag_rate)
    options = atp.FitOptions(goal=goal, output=output, batch_size=batch_size, seed=seed)
    if out is not None:
        _make_folder(out)
    with progress_bars() as progress:
        ladder = atp.debug(atp.load(model), atp.DebugSet.load(data), options, progress=progress)
    shown = ladder.to_json()
    lines: list[Any] = [text.ladder_table(ladder)]
    if out is not None:
        shown["files"] = {fix.name: [_patch_file(out, patch) for patch in fix.patches] for fix in ladder.fixes}
        lines += [f"{name}: {' '.join(files)}" for name, files in shown["files"].items() if files]
    _show(shown, lines, as_json)
    if ladder.recommended is None:
        raise FitError(
            str(model), expected="at least one fix", found=ladder.reason, advice="See above why there is none."
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PatchFileError(
            str(folder), expected="a folder, or room for one", found=str(error), advice="Choose another path."
        ) from error


def _patch_file(folder: Path, patch: atp.Patch) -> str:
    """Write a patch under its id; its name."""
    path = folder / f"{patch.figures.get('method', 'attention')}-{patch.id}.safetensors"
    patch.save(path)
    return str(path)


@app.command()
def bake(
    model: Model,
    patch: Patches,
    out: Out,
    target: Annotated[str, typer.Option(help=f"Where it will run: {', '.join(TARGETS)}.")] = "cpu",
    emission: Annotated[
        Literal["conditional", "branchless"] | None,
        typer.Option(help="The form, if not the target's own.", show_default=False),
    ] = None,
    inline: Annotated[
        bool | None, typer.Option("--inline/--functions", help="Leave no model-local functions, or do.")
    ] = None,
    monitor: Annotated[bool, typer.Option(help="Add the outputs atpatch/flagged and atpatch/score.")] = True,
    site_flags: Annotated[bool, typer.Option("--site-flags", help="Add the flags of every patched site.")] = False,
    quantizer_settings: Annotated[
        Path | None,
        typer.Option(help="Write what quantizers must be told to this JSON file.", show_default=False),
    ] = None,
    external: ExternalData = None,
    as_json: AsJson = False,
) -> None:
    """Put PATCH into MODEL's graph."""
    patched = atp.bake(
        atp.load(model),
        [atp.Patch.load(path) for path in patch],
        target=target,
        emission=None if emission is None else atp.Emission(emission),
        inline=inline,
        monitor=monitor,
        site_flags=site_flags,
    )
    atp.save(patched, out, external=external)
    record = read_record(patched)
    shown = {"file": str(out), "patch": record.patch, "base": record.base, "emission": record.emission}
    names = ", ".join([*(site.site for site in record.sites), *(layer.layer for layer in record.layers)])
    lines = [f"wrote {out}: patch {record.patch}, {record.emission}, at {names}"]
    if quantizer_settings is not None:
        from atpatch_onnx.quantization import write_settings

        write_settings(patched, quantizer_settings)
        shown["quantizer_settings"] = str(quantizer_settings)
        lines.append(f"wrote {quantizer_settings}: keyword arguments for onnxruntime's quantizers")
    _show(shown, lines, as_json)


@app.command()
def strip(patched: Patched, out: Out, external: ExternalData = None, as_json: AsJson = False) -> None:
    """Take the patch out of PATCHED again; the fingerprint proves that the base is back."""
    base = atp.strip(atp.load(patched))
    atp.save(base, out, external=external)
    shown = {"file": str(out), "fingerprint": atp.fingerprint(base)}
    _show(shown, [f"wrote {out}: the base, {shown['fingerprint']}"], as_json)


@app.command()
def verify(
    base: Base,
    patched: Patched,
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", help="A debug set; without it, structure only.")
    ] = None,
    batch_size: BatchSize = 32,
    as_json: AsJson = False,
) -> None:
    """Prove PATCHED against BASE: structure, strip, numbers."""
    debug = None if data is None else atp.DebugSet.load(data)
    with progress_bars() as progress:
        result = atp.verify(base, patched, debug, batch_size=batch_size, progress=progress)
    _show(result.to_json(), [text.verification_table(result)], as_json)
    if not result.passed:
        raise VerificationError(
            str(patched),
            expected=f"all {len(result.checks)} checks to pass",
            found=f"{len(result.failures)} that failed: {', '.join(check.name for check in result.failures)}",
            advice="Do not ship this file: bake the patch into the base again.",
        )


@app.command()
def evaluate(
    base: Base,
    patched: Patched,
    data: Data,
    target_class: Annotated[int | None, typer.Option(help="The backdoor's class, if DATA does not name it.")] = None,
    output: Output = None,
    batch_size: BatchSize = 32,
    as_json: AsJson = False,
) -> None:
    """Measure BASE and PATCHED on pairs that the fit never saw."""
    debug = atp.DebugSet.load(data)
    if target_class is not None:
        debug = debug.with_target(target_class)
    with progress_bars() as progress:
        result = atp.evaluate(base, patched, debug, output=output, batch_size=batch_size, progress=progress)
    _show(result.to_json(), [text.evaluation_table(result)], as_json)


@app.command()
def benchmark(
    base: Base,
    patched: Annotated[
        Path | None, typer.Argument(metavar="[PATCHED]", help="The patched file; or --synthetic.", show_default=False)
    ] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="What would a patch at every site cost?")] = False,
    decision: Annotated[
        Literal["alone", "joint"], typer.Option(help="Of a synthetic patch: how sites decide.")
    ] = "alone",
    features: Annotated[
        Features | None, typer.Option(help="Of a synthetic patch: what its detectors read.", show_default=False)
    ] = None,
    target: Annotated[str, typer.Option(help=f"Of a synthetic patch: {', '.join(TARGETS)}.")] = "cpu",
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; 1 and 8 by default.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Numbers of threads; 2 by default.")] = None,
    length: Annotated[int, typer.Option(help="Tokens, where the model leaves their number free.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often each form is timed.")] = 40,
    sessions: Annotated[int, typer.Option(help="How often each form is opened for that.")] = 4,
    memory: Annotated[bool, typer.Option(help="Measure peak memory as well.")] = True,
    as_json: AsJson = False,
) -> None:
    """Time PATCHED, or a synthetic patch, against BASE: clean and flagged inputs, in turns."""
    if (patched is None) is not synthetic:
        raise typer.BadParameter("give either PATCHED or --synthetic")
    with progress_bars() as progress:
        result = atp.benchmark(
            base,
            patched,
            target=target,
            features=features,
            decision=decision,
            batches=batch or (1, 8),
            threads=threads or (2,),
            length=length,
            rounds=rounds,
            sessions=sessions,
            memory=memory,
            progress=progress,
        )
    _show(result.to_json(), [text.benchmark_table(result)], as_json)


@app.command()
def quantize(
    model: Model,
    patch: Patches,
    out: Out,
    precision: Annotated[Literal["int8", "fp16"], typer.Option(help="What the model computes in.")] = "int8",
    target: Annotated[str, typer.Option(help=f"Where it will run: {', '.join(TARGETS)}.")] = "cpu",
    data: Annotated[
        Path | None, typer.Option(help="A debug set that the fit never saw: measure again.", show_default=False)
    ] = None,
    output: Output = None,
    batch_size: BatchSize = 32,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL with onnxruntime's tools, put PATCH into it, in float32, and measure again what it does."""
    base, fix = atp.load(model), atp.compose([atp.Patch.load(path) for path in patch])
    quantized = atp.quantize(base, precision)
    patched = atp.bake(quantized, atp.rebind(fix, base, quantized), target=target)
    atp.save(patched, out)
    shown: dict[str, Any] = {"file": str(out), "precision": precision}
    lines: list[Any] = [f"wrote {out}: {precision}, patch {fix.id}; strip it for the {precision} base"]
    if data is not None:
        debug = atp.DebugSet.load(data)
        pairs = {"float32": (base, atp.bake(base, fix)), precision: (quantized, patched)}
        for name, (before, after) in pairs.items():
            with progress_bars() as progress:
                found = atp.evaluate(before, after, debug, output=output, batch_size=batch_size, progress=progress)
            shown[name] = found.to_json()
            lines += [f"{name}:", text.evaluation_table(found)]
    _show(shown, lines, as_json)


@app.command()
def report(
    base: Base,
    patched: Patched,
    data: Data,
    out: Out,
    patch: Annotated[
        list[Path], typer.Option(help="The patch that was baked; once for each of several.", show_default=False)
    ],
    title: Annotated[str, typer.Option(help="The heading.")] = "AtPatch report",
    output: Output = None,
    batch_size: BatchSize = 32,
) -> None:
    """Write one self-contained HTML file: verdict, pictures, curve, sites, checks."""
    from atpatch_onnx.examples import gather_examples
    from atpatch_onnx.report import html

    before, after, debug = atp.load(base), atp.load(patched), atp.DebugSet.load(data)
    with progress_bars() as progress:
        evaluation = atp.evaluate(before, after, debug, output=output, batch_size=batch_size, progress=progress)
        verification = atp.verify(before, after, debug, batch_size=batch_size, progress=progress)
    page = html.render_html(
        title=title,
        patch=atp.compose([atp.Patch.load(path) for path in patch]),
        evaluation=evaluation,
        verification=verification,
        examples=gather_examples(before, after, debug, output=output),
    )
    html.write_report(out, page)
    _show({}, [f"wrote {out}"], False)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A transformers model, as save_pretrained wrote it.")],
    inputs: Annotated[Path, typer.Argument(metavar="INPUTS", help="Sample inputs by name, an .npz file.")],
    out: Out,
    patch: Annotated[Path | None, typer.Option(help="Bake this patch into the export.", show_default=False)] = None,
    target: Annotated[str, typer.Option(help=f"Where it will run: {', '.join(TARGETS)}.")] = "cpu",
    dynamic: Annotated[bool, typer.Option(help="Leave batch and sequence axes free.")] = True,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the exporter's own by default.")] = None,
) -> None:
    """Export a transformers model to ONNX, patched if a patch is given."""
    from atpatch_onnx.exporters import from_pretrained

    exported = from_pretrained(
        model,
        inputs,
        dynamic=dynamic,
        opset=opset,
        patch=None if patch is None else atp.Patch.load(patch),
        target=target,
    )
    atp.save(exported, out)
    what = f"the base, {len(atp.find_sites(exported))} attention sites" if patch is None else "patched"
    _show({}, [f"wrote {out}: {what}"], False)


@app.command("serve-config")
def serve_config(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write to.")],
    stack: Annotated[Literal["triton", "kserve"], typer.Option(help="What will serve it.")],
    name: Annotated[str | None, typer.Option(help="Of the model; the file's by default.", show_default=False)] = None,
    max_batch_size: Annotated[int, typer.Option(help="Requests that are run together at most.", min=1)] = 32,
    kind: Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="Where instances run.")] = "auto",
    storage: Annotated[str, typer.Option(help="KServe: URI of the uploaded model repository.")] = "pvc://models",
) -> None:
    """Write a Triton model repository for MODEL, or a KServe manifest and the repository it serves."""
    from atpatch_onnx.serving import KServeOptions, TritonOptions, write_inference_service, write_model_repository

    served, called = atp.load(model), name or model.stem
    triton = TritonOptions(max_batch_size=max_batch_size, kind=kind)
    if stack == "triton":
        wrote = write_model_repository(served, folder, called, triton)
    else:
        wrote = write_inference_service(served, folder, called, KServeOptions(storage=storage, triton=triton))
    _show({}, [f"wrote {wrote}"], False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of training and fit.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a backdoored ViT on handwritten digits and fix it: the whole walk, nothing downloaded."""
    from atpatch_onnx.demo.run import run_demo

    with progress_bars() as progress:
        result = run_demo(out, seed=seed, progress=progress)
    shown: list[RenderableType] = [
        text.fit_table(result.patch),
        text.verification_table(result.verification),
        text.evaluation_table(result.evaluation),
        f"{result.figures['seconds']:.0f} s; base.onnx, fix.safetensors, patched.onnx, report.html and result.json"
        f" are in {out}",
    ]
    _show(result.figures, shown, as_json)


# Printing


def _require_folder(out: Path) -> None:
    """Better said now than after the fit."""
    if not out.parent.is_dir():
        raise PatchFileError(
            str(out),
            expected="a place that can be written to",
            found=f"no folder {out.parent}",
            advice="Make the folder, or choose another path.",
        )


def _show(shown: Mapping[str, Any], renderables: Sequence[RenderableType], as_json: bool) -> None:
    """Print a result, for people or for machines."""
    if as_json:
        sys.stdout.write(json.dumps(dict(shown), indent=2) + "\n")
        return
    console = Console(soft_wrap=False)
    for renderable in renderables:
        console.print(renderable, highlight=False)


@contextmanager
def progress_bars() -> "Iterator[Progress]":
    """Progress bars on stderr, one for each stage; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield progress


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 after an error, or 2 after wrong usage."""
    try:
        app(args=arguments)
    except AtPatchError as error:
        sys.stderr.write(f"atpatch: {' '.join(str(error).split())}\n")
        return 1
    except SystemExit as exit_:  # how typer ends, well or after wrong usage, whichever click it brings along
        return exit_.code if isinstance(exit_.code, int) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
