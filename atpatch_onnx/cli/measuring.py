"""Commands that hold a patched model against its base."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import atpatch_onnx as atp
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.cli.arguments import (
    TARGETS,
    AsJson,
    Base,
    BatchSize,
    CustomOps,
    Data,
    On,
    Out,
    Output,
    Patched,
    Pieces,
    Provider,
    Seed,
    Steps,
    Workers,
)
from atpatch_onnx.cli.paths import require_place
from atpatch_onnx.cli.printing import atpatch, progress_bars, require_passed, show
from atpatch_onnx.cli.trusting import PublicKey, Roots, Signature, checked_signature
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.report import text
from atpatch_onnx.running.executors import executing

Decode = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        help="Base and patched decode graph, where BASE and PATCHED read prompts only.",
        metavar="BASE PATCHED",
        show_default=False,
    ),
]


def verify(
    base: Base,
    patched: Patched,
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", help="A debug set; without it, structure only.")
    ] = None,
    patch: Annotated[
        list[Path] | None,
        typer.Option(
            "--patch",
            metavar="PATCH",
            help="The patch that is said to be in it, a .safetensors file; or several, in order.",
            show_default=False,
        ),
    ] = None,
    signature: Signature = None,
    public_key: PublicKey = None,
    root: Roots = None,
    decode: Decode = None,
    provider: Provider = "cpu",
    steps: Steps = atp.FitOptions.steps,
    batch_size: BatchSize = 32,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
) -> None:
    """Prove PATCHED against BASE: that it is BASE and a patch, which one, and what it does."""
    signed = checked_signature(patched, signature, public_key, root)
    debug = None if data is None else atp.DebugSet.load(data)
    patches = [atp.Patch.load(path) for path in patch] if patch else None
    run: dict[str, Any] = {"decode": decode, "steps": steps, "batch_size": batch_size, "providers": [provider]}
    with progress_bars() as progress:
        result = atp.verify(base, patched, debug, patch=patches, custom_ops=custom_ops or (), progress=progress, **run)
    then = atpatch("evaluate", base, patched, data or "UNSEEN.npz") if result.passed else None
    shown = result.to_json() | ({} if signed is None else {"signed_by": signed})
    lines = [] if signed is None else [f"signed by {signed}, checked"]
    show(shown, [*lines, text.verification_table(result)], as_json, then=then)
    require_passed(patched, result, "Do not ship this file: bake the patch into the base again.")


def evaluate(
    base: Base,
    patched: Patched,
    data: Data,
    target_class: Annotated[int | None, typer.Option(help="The backdoor's class, if DATA does not name it.")] = None,
    output: Output = None,
    decode: Decode = None,
    provider: Provider = "cpu",
    steps: Steps = atp.FitOptions.steps,
    samples: Annotated[int, typer.Option(min=1, help="Of prompts: answers drawn at a temperature of 1.")] = 5,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    on: On = "local",
    workers: Workers = None,
    resume: Pieces = None,
    as_json: AsJson = False,
) -> None:
    """Measure BASE and PATCHED on pairs, or prompts, that the fit never saw."""
    debug = atp.DebugSet.load(data)
    if debug.kind == "generation":
        run: dict[str, Any] = {"steps": steps, "samples": samples, "batch_size": batch_size, "seed": seed}
        run |= {"decode": decode, "providers": [provider], "custom_ops": custom_ops or ()}
        with progress_bars() as progress:
            written = atp.evaluate_prompts(base, patched, debug, progress=progress, **run)
        then = atpatch("serve-config", patched, "DIR", "--stack", "genai", "--base", "BASE_DIR")
        show(written.to_json(), [text.written_table(written)], as_json, then=then)
        return
    if target_class is not None:
        debug = debug.with_target(target_class)
    with executing(on, workers=workers, resume=resume) as executor, progress_bars() as progress:
        how: dict[str, Any] = {"custom_ops": custom_ops or (), "batch_size": batch_size, "progress": progress}
        result = atp.evaluate(base, patched, debug, output=output, providers=[provider], executor=executor, **how)
    then = atpatch("report", base, patched, data, "--patch", "FIX.safetensors", "-o", "report.html")
    show(result.to_json(), [text.evaluation_table(result)], as_json, then=then)


def benchmark(
    base: Base,
    patched: Annotated[
        Path | None, typer.Argument(metavar="[PATCHED]", help="The patched file; or --synthetic.", show_default=False)
    ] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="What would a patch at every site cost?")] = False,
    detectors: Annotated[
        Literal["linear", "hidden"], typer.Option(help="Of a synthetic patch: the kind of its detectors.")
    ] = "linear",
    target: Annotated[str, typer.Option(help=f"Of a synthetic patch: {', '.join(TARGETS)}.")] = "cpu",
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; 1 and 8 by default.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Numbers of threads; 2 by default.")] = None,
    length: Annotated[int, typer.Option(help="Tokens, where the model leaves their number free.")] = 128,
    past: Annotated[
        int | None, typer.Option(help="Tokens in the cache of a decoder, where it is free.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each form is timed.")] = 40,
    sessions: Annotated[int, typer.Option(help="How often each form is opened for that.")] = 4,
    memory: Annotated[bool, typer.Option(help="Measure peak memory as well, of the CPU.")] = True,
    provider: Provider = "cpu",
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Record a run, and play it again.")] = False,
    custom_ops: CustomOps = None,
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
            detectors=detectors,
            batches=batch or (1, 8),
            threads=threads or (2,),
            length=length,
            past=past,
            rounds=rounds,
            sessions=sessions,
            memory=memory,
            providers=[provider],
            cuda_graph=cuda_graph,
            custom_ops=custom_ops or (),
            progress=progress,
        )
    then = atpatch("fit", base, "PAIRS.npz", "-o", "fix.safetensors")
    if patched is not None:
        then = atpatch("serve-config", patched, "DIR", "--stack", "triton")
    show(result.to_json(), [text.benchmark_table(result)], as_json, then=then)


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
    custom_ops: CustomOps = None,
    batch_size: BatchSize = 32,
) -> None:
    """Write one self-contained HTML file: verdict, pictures, curve, sites, checks."""
    require_place(out, base, patched, data, *patch)
    from atpatch_onnx.measuring.examples import gather_examples
    from atpatch_onnx.report import html

    debug, fix = atp.DebugSet.load(data), atp.compose([atp.Patch.load(path) for path in patch])
    record = read_record(atp.load(patched))
    if fix.id != record.patch:
        raise PatchMismatchError(
            str(patched),
            expected=f"the patch {fix.id} in it",
            found=f"the patch {record.patch}",
            advice="Give the patch that was baked; all of them, in their order, where there were several.",
        )
    before, after = (atp.load(path, custom_ops=custom_ops or ()) for path in (base, patched))
    with progress_bars() as progress:
        how: dict[str, Any] = {"custom_ops": custom_ops or (), "batch_size": batch_size, "progress": progress}
        evaluation = atp.evaluate(base, patched, debug, output=output, **how)
        verification = atp.verify(base, patched, debug, patch=fix, **how)
    page = html.render_html(
        title=title,
        patch=fix,
        evaluation=evaluation,
        verification=verification,
        examples=gather_examples(before, after, debug, output=output),
    )
    html.write_report(out, page)
    show({}, [f"wrote {out}"], False, then=atpatch("benchmark", base, patched))
