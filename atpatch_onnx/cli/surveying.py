"""The command that looks at many models."""

from pathlib import Path
from typing import Annotated

import typer

from atpatch_onnx.cli import arguments as args
from atpatch_onnx.cli.paths import require_place
from atpatch_onnx.cli.printing import progress_bars, show
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.running.executors import executing


def zoo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Models, and folders of them.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The table to write: .html or .parquet.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with clean inputs, NAME.npz or NAME.parquet for NAME.onnx: these models are scanned.",
            show_default=False,
        ),
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Try a drawn patch on every model with a site.")] = False,
    on: args.On = "local",
    workers: args.Workers = None,
    resume: args.Pieces = None,
    as_json: args.AsJson = False,
) -> None:
    """Look at every model in FOLDER: what can be patched, what is refused and why, and what a scan says."""
    if out is not None:
        if out.suffix not in (".html", ".parquet"):
            raise AtPatchError(
                str(out),
                expected="a file that ends with .html or .parquet",
                found=out.suffix or "no ending",
                advice="Name it so.",
            )
        require_place(out, folder)
    from atpatch_onnx.measuring.zoo import survey
    from atpatch_onnx.report import zoo as report

    with executing(on, workers=workers, resume=resume) as executor, progress_bars() as progress:
        found = survey(folder, data, rehearsing=rehearse, executor=executor, progress=progress)
    lines = [report.in_a_line(found)]
    if out is None:
        show({"models": [one.to_json() for one in found]}, [report.zoo_table(found), *lines], as_json)
        return
    if out.suffix == ".parquet":
        report.write_columns(out, found)
    else:
        from atpatch_onnx.report.html import write_report

        write_report(out, report.render_zoo(found, f"{folder.resolve().name}: models"))
    show({"models": [one.to_json() for one in found]}, [*lines, f"wrote {out}"], as_json)
