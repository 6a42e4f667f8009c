"""Places that commands write to."""

from pathlib import Path

from atpatch_onnx.errors import AtPatchError, PatchFileError
from atpatch_onnx.files import staging


def require_place(out: Path, *inputs: Path) -> None:
    """Refuse to write over what a command reads, or into a folder that is not there: better said before the work."""
    for read in inputs:
        inside = read.is_dir() and out.resolve().is_relative_to(read.resolve())
        if inside or (out.exists() and read.exists() and out.samefile(read)):
            raise AtPatchError(
                str(out),
                expected="a file that the command does not read",
                found=f"{'a place in ' if inside else ''}its input {read}",
                advice="Choose another path: what is in this file would be lost.",
            )
    try:
        with staging(out.parent):
            pass
    except OSError as error:
        raise PatchFileError(
            str(out),
            expected="a place that can be written to",
            found=str(error) if out.parent.is_dir() else f"no folder {out.parent}",
            advice="Make the folder, or choose another path.",
        ) from error


def make_folder(folder: Path) -> None:
    """Make it, if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PatchFileError(
            str(folder), expected="a folder, or room for one", found=str(error), advice="Choose another path."
        ) from error
