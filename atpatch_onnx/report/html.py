"""The report as one HTML file that needs nothing beside it: no script, no font, no picture from elsewhere."""

import os
from collections.abc import Sequence
from pathlib import Path

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.errors import AtPatchError, require
from atpatch_onnx.files import write_whole
from atpatch_onnx.measuring.evaluate import Evaluation
from atpatch_onnx.measuring.examples import Example
from atpatch_onnx.measuring.verify import Verification
from atpatch_onnx.patches.patch import Patch


def render_html(
    *,
    title: str,
    patch: Patch | PatchRecord,
    evaluation: Evaluation | None = None,
    verification: Verification | None = None,
    examples: Sequence[Example] | None = None,
    seconds: float | None = None,
) -> str:
    """The report; the same results give the same text. A section without results is left out.

    Args:
        title: The heading.
        patch: The patch, or what a patched file says of it (`metadata.read_record`).
        evaluation: Base against patched.
        verification: The checks of the patched file.
        examples: Pairs to look at closely.
        seconds: How long it all took, where that is worth telling.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        require(package, "report", "writing a report")
    from atpatch_onnx.report.page import render

    return render(title, patch, evaluation, verification, tuple(examples or ()), seconds)


def write_report(path: str | os.PathLike[str], html: str) -> None:
    """Write a report; the file appears whole or not at all.

    Raises:
        AtPatchError: The file cannot be written.
    """
    path = Path(path)
    try:
        write_whole(path, html.encode())
    except OSError as error:
        raise AtPatchError(
            str(path), expected="a place that can be written to", found=str(error), advice="Choose another path."
        ) from error
