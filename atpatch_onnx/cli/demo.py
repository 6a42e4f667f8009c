"""The command that walks the whole way on an example."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from atpatch_onnx.cli.arguments import AsJson
from atpatch_onnx.cli.printing import atpatch, progress_bars, show
from atpatch_onnx.errors import require
from atpatch_onnx.report import text


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of training and fit.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a backdoored ViT on handwritten digits and fix it: the whole walk, nothing downloaded."""
    for package, extra in (("torch", "fit"), ("sklearn", "fit"), ("matplotlib", "report"), ("jinja2", "report")):
        require(package, extra, "the demo")
    from atpatch_onnx.cli.demo_run import run_demo

    with progress_bars() as progress:
        result = run_demo(out, seed=seed, progress=progress)
    shown: list[RenderableType] = [
        text.fit_table(result.patch),
        text.verification_table(result.verification),
        text.evaluation_table(result.evaluation),
        f"{result.figures['seconds']:.0f} s; base.onnx, fix.safetensors, patched.onnx, report.html and result.json"
        f" are in {out}",
    ]
    show(result.figures, shown, as_json, then=atpatch("inspect", out / "patched.onnx"))
