"""Places that commands write to."""

from pathlib import Path

from atpatch_onnx.errors import PatchFileError


def require_folder(out: Path) -> None:
    """Refuse a file without a folder: better said now than after the fit.

    Raises:
        PatchFileError: There is none.
    """
    if not out.parent.is_dir():
        raise PatchFileError(
            str(out),
            expected="a place that can be written to",
            found=f"no folder {out.parent}",
            advice="Make the folder, or choose another path.",
        )


def make_folder(folder: Path) -> None:
    """Make it, if it is not there.

    Raises:
        PatchFileError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PatchFileError(
            str(folder), expected="a folder, or room for one", found=str(error), advice="Choose another path."
        ) from error
