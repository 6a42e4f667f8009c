"""Finished pieces of a long search, kept in a folder: a search that was stopped goes on where it was."""

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from atpatch_onnx.errors import DiscoveryError, one_line
from atpatch_onnx.files import write_whole
from atpatch_onnx.running.sessions import Array


class Finished:
    """A folder of finished pieces, or none.

    Args:
        folder: Made if it is not there; None: nothing is kept.
        job: What tells the search apart, of JSON types; pieces of another one are refused.
        inputs: Arrays that the search is of.

    Raises:
        DiscoveryError: The folder cannot be written to, or holds something else or pieces of another search.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, job: Mapping[str, Any], inputs: Mapping[str, Array]
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        digest = sha256(json.dumps(job, sort_keys=True).encode())
        for name in sorted(inputs):
            array = np.ascontiguousarray(inputs[name])
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        note, own = self._folder / "search.json", json.dumps({"search": digest.hexdigest()}) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            found = note.read_text() if note.is_file() else None
            if found is None and not any(self._folder.iterdir()):
                write_whole(note, own.encode())
                found = own
        except OSError as error:
            raise self._refused(one_line(error)) from error
        if found != own:
            raise self._refused("something else" if found is None else "pieces of a search of other inputs or options")

    def piece(self, name: str, make: Callable[[], Array]) -> Array:
        """The array of a piece: kept from before, or made now and kept.

        Raises:
            DiscoveryError: What was kept is damaged, or cannot be kept.
        """
        if self._folder is None:
            return make()
        file = self._folder / f"{name}.npy"
        try:
            if file.is_file():
                kept: Array = np.load(file, allow_pickle=False)
                return kept
        except (OSError, ValueError, EOFError) as error:
            raise self._refused(f"{file.name}: {one_line(error)}") from error
        made = make()
        try:
            write_whole(file, _bytes(made))
        except OSError as error:
            raise self._refused(one_line(error)) from error
        return made

    def _refused(self, found: str) -> DiscoveryError:
        return DiscoveryError(
            str(self._folder),
            expected="a new folder, or the finished pieces of this search",
            found=found,
            advice="Name another folder, or remove this one.",
        )


def _bytes(array: Array) -> bytes:
    file = BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
