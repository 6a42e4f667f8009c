"""Commands that write a model: with a patch, without it, quantized, exported."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import atpatch_onnx as atp
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.cli.arguments import (
    EXPERT,
    AsJson,
    BatchSize,
    CustomOps,
    ExternalData,
    Model,
    Out,
    Output,
    Patched,
    Patches,
    Target,
)
from atpatch_onnx.cli.paths import require_place
from atpatch_onnx.cli.printing import atpatch, progress_bars, show
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.report import text


def bake(
    model: Model,
    patch: Patches,
    out: Out,
    target: Target = "cpu",
    conditional: Annotated[
        bool | None,
        typer.Option(
            help="Replacements in an If, or not, if not as the target has it.",
            show_default=False,
            rich_help_panel=EXPERT,
        ),
    ] = None,
    monitor: Annotated[
        bool, typer.Option(help="Add the outputs atpatch/flagged and atpatch/score.", rich_help_panel=EXPERT)
    ] = True,
    site_flags: Annotated[
        bool, typer.Option("--site-flags", help="Add the flags of every patched site.", rich_help_panel=EXPERT)
    ] = False,
    decode: Annotated[
        Path | None,
        typer.Option(
            help="Another export of the same model, such as its decode graph: patched alike.", show_default=False
        ),
    ] = None,
    decode_out: Annotated[Path | None, typer.Option(help="The file to write for it.", show_default=False)] = None,
    quantizer_settings: Annotated[
        Path | None,
        typer.Option(
            help="Write what quantizers must be told to this JSON file.", show_default=False, rich_help_panel=EXPERT
        ),
    ] = None,
    external: ExternalData = None,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
) -> None:
    """Put PATCH into MODEL's graph."""
    require_place(out, model, *patch)
    if quantizer_settings is not None:
        require_place(quantizer_settings, model, *patch)
    if (decode is None) is not (decode_out is None):
        raise typer.BadParameter("give --decode and --decode-out together")
    base, patches = atp.load(model, custom_ops=custom_ops or ()), [atp.Patch.load(path) for path in patch]
    how: dict[str, Any] = {
        "target": target,
        "conditional": conditional,
        "monitor": monitor,
        "site_flags": site_flags,
    }
    patched = atp.bake(base, patches, **how)
    other = None
    if decode is not None and decode_out is not None:
        from atpatch_onnx.baking.transfer import transfer

        require_place(decode_out, model, decode, out, *patch)
        second = atp.load(decode, custom_ops=custom_ops or ())
        other = atp.bake(second, [transfer(one, base, second) for one in patches], **how)
        atp.save(other, decode_out, external=external)
    atp.save(patched, out, external=external)
    record = read_record(patched)
    shown = {"file": str(out), "patch": record.patch, "base": record.base, "conditional": record.conditional}
    names = ", ".join([*(site.site for site in record.sites), *(layer.layer for layer in record.layers)])
    lines = [f"wrote {out}: patch {record.patch}, {'with' if record.conditional else 'without'} If, at {names}"]
    if other is not None:
        shown["decode"] = str(decode_out)
        lines.append(f"wrote {decode_out}: the same for {decode}")
    if quantizer_settings is not None:
        from atpatch_onnx.baking.quantize import write_settings

        write_settings(patched, quantizer_settings)
        shown["quantizer_settings"] = str(quantizer_settings)
        lines.append(f"wrote {quantizer_settings}: keyword arguments for onnxruntime's quantizers")
    given = [part for path in patch for part in ("--patch", path)]
    both = [] if decode is None else ["--decode", decode, decode_out]
    show(shown, lines, as_json, then=atpatch("verify", model, out, "UNSEEN.npz", *given, *both))


def unbake(
    patched: Patched,
    out: Out,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", help="The base, to compare with: a file can name any model its base.", show_default=False
        ),
    ] = None,
    external: ExternalData = None,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
) -> None:
    """Take the patch out of PATCHED again: the base is back, by the fingerprint that PATCHED has of it."""
    require_place(out, patched, *([] if base is None else [base]))
    unbaked = atp.unbake(atp.load(patched))
    found = atp.fingerprint(unbaked)
    if base is not None and atp.fingerprint(atp.load(base, custom_ops=custom_ops or ())) != found:
        raise UnbakeError(
            str(patched),
            expected=f"a patch in {base}",
            found=f"one in another model, {found}",
            advice="Do not trust this file: it was not made from this base.",
        )
    atp.save(unbaked, out, external=external)
    said = f"which is {base}" if base is not None else f"by {patched}'s own word; compare it with --base"
    show(
        {"file": str(out), "fingerprint": found},
        [f"wrote {out}: the base {found}, {said}"],
        as_json,
        then=atpatch("sites", out),
    )


def quantize(
    model: Model,
    patch: Patches,
    out: Out,
    precision: Annotated[Literal["int8", "fp16"], typer.Option(help="What the model computes in.")] = "int8",
    target: Target = "cpu",
    data: Annotated[
        Path | None, typer.Option(help="A debug set that the fit never saw: measure again.", show_default=False)
    ] = None,
    output: Output = None,
    batch_size: BatchSize = 32,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL with onnxruntime's tools, put PATCH into it, in float32, and measure again what it does."""
    from atpatch_onnx.baking import quantize as quantizing

    require_place(out, model, *patch, *([] if data is None else [data]))
    base, fix = atp.load(model, custom_ops=custom_ops or ()), atp.compose([atp.Patch.load(path) for path in patch])
    quantized = quantizing.quantize(base, precision)
    patched = atp.bake(quantized, quantizing.rebind(fix, base, quantized), target=target)
    atp.save(patched, out)
    shown: dict[str, Any] = {"file": str(out), "precision": precision}
    lines: list[Any] = [f"wrote {out}: {precision}, patch {fix.id}; unbake it for the {precision} base"]
    if data is not None:
        debug = atp.DebugSet.load(data)
        pairs = {"float32": (base, atp.bake(base, fix)), precision: (quantized, patched)}
        for name, (before, after) in pairs.items():
            with progress_bars() as progress:
                found = atp.evaluate(before, after, debug, output=output, batch_size=batch_size, progress=progress)
            shown[name] = found.to_json()
            lines += [f"{name}:", text.evaluation_table(found)]
    show(shown, lines, as_json, then=atpatch("inspect", out))


def export(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A transformers model, as save_pretrained wrote it.")],
    inputs: Annotated[Path, typer.Argument(metavar="INPUTS", help="Sample inputs by name, an .npz file.")],
    out: Out,
    patch: Annotated[Path | None, typer.Option(help="Bake this patch into the export.", show_default=False)] = None,
    target: Target = "cpu",
    dynamic: Annotated[bool, typer.Option(help="Leave batch and sequence axes free.")] = True,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the exporter's own by default.")] = None,
) -> None:
    """Export a transformers model to ONNX, patched if a patch is given."""
    from atpatch_onnx.exporters import from_pretrained

    require_place(out, inputs, *([] if patch is None else [patch]))
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
    then = atpatch("sites", out) if patch is None else atpatch("inspect", out)
    show({}, [f"wrote {out}: {what}"], False, then=then)
