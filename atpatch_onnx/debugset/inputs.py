"""Inputs of a model in a file, without counterfactuals: traffic, or clean inputs.

A `.npz` file with one array `[inputs, ...]` for each of the model's inputs, under its name; Parquet or Arrow files with
such columns (`debugset.columns`); or a debug set, of which the clean side is taken. Nothing is pickled, and nothing
pickled is read.
"""

import os
import zipfile
from pathlib import Path

from atpatch_onnx.debugset import columns
from atpatch_onnx.debugset.archives import read_member
from atpatch_onnx.debugset.arrays import Array, as_inputs, check_finite
from atpatch_onnx.debugset.pairs import DebugSet
from atpatch_onnx.debugset.rows import as_stored
from atpatch_onnx.errors import DebugSetError, one_line


def load_inputs(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Arrays `[inputs, ...]` by the model's input names.

    Raises:
        DebugSetError: Nothing there, a damaged or foreign file, or arrays of different lengths or with NaN.
    """
    text, path = columns.as_text(path), Path(path)
    if columns.is_columns(text):
        table = columns.opened(text)
        if any(name.startswith("clean/") for name in table.columns):
            return dict(DebugSet.load(text).clean)
        named = [name for name, column in table.columns.items() if column.values is None]
        return as_inputs({name: as_stored(table.stored(name)) for name in named}, text)
    if path.is_dir():
        return dict(DebugSet.load(path).clean)
    if not path.is_file():
        raise DebugSetError(
            str(path),
            expected="a .npz file of inputs, or Parquet files",
            found="nothing there",
            advice="Check the path.",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.startswith("clean/") for name in names):
                return dict(DebugSet.load(path).clean)
            if len(set(names)) < len(names):
                raise ValueError("a name that is there twice")
            if sum(member.compress_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("members that share their bytes")
            arrays = {one.filename.removesuffix(".npy"): read_member(archive, one) for one in archive.infolist()}
    except DebugSetError:
        raise
    except Exception as error:  # zipfile and numpy's header parser raise a dozen types
        raise DebugSetError(
            str(path),
            expected="a .npz file with an array for each of the model's inputs, nothing pickled",
            found=one_line(error),
            advice="Write it with numpy.savez, under the names of the model's inputs.",
        ) from error
    inputs = as_inputs(arrays, str(path))
    for name, array in inputs.items():
        check_finite(array, f"{path}: {name!r}")
    return inputs
