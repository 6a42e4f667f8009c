"""Many models looked at: which can be patched, what was refused and why; on request a rehearsal, and a scan.

A model that cannot be read, or that a worker died of, is a line of the table like the others: nothing ends the rest.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from atpatch_onnx.debugset.inputs import load_inputs
from atpatch_onnx.discovery.options import ScanOptions
from atpatch_onnx.discovery.scanning import scan
from atpatch_onnx.errors import AtPatchError, ModelFileError
from atpatch_onnx.matching import explain
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.running.executors import LOCAL, Executor, Kept, executing, key_of
from atpatch_onnx.running.opening import load
from atpatch_onnx.running.sessions import Progress, silent

_DATA = (".npz", ".parquet", "")
"""What clean inputs end with, beside the model's name; the last is a folder."""


@dataclass(frozen=True)
class Looked:
    """What was found of one model."""

    model: str
    """Its path, from the folder on."""

    sites: int = 0
    """Attention that can be patched."""

    forms: tuple[str, ...] = ()
    refused: tuple[tuple[str, int], ...] = ()
    """Why attention is not patched, and how often."""

    error: str = ""
    """Why it could not be looked at."""

    verdict: str = ""
    """Of a scan; empty where there was none."""

    scanned: str = ""
    """The sentence of the scan, or why there was none; empty where there were no inputs."""

    rehearsed: str = ""
    """`exact`, or what a drawn patch fails at; empty where it was not asked for."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self) | {"forms": list(self.forms), "refused": [list(one) for one in self.refused]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """What `to_json` made."""
        refused = tuple((str(reason), int(count)) for reason, count in found["refused"])
        return cls(**found | {"forms": tuple(found["forms"]), "refused": refused})


def survey(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    options: ScanOptions | None = None,
    *,
    rehearsing: bool = False,
    executor: Executor | str = LOCAL,
    progress: Progress = silent,
) -> tuple[Looked, ...]:
    """Look at every `.onnx` file in a folder, and below it.

    Args:
        folder: The models.
        data: A folder with clean inputs: for `NAME.onnx`, `NAME.npz`, `NAME.parquet` or a folder `NAME`, at the same
            place below it. None: no model is scanned.
        options: Of the scans.
        rehearsing: Whether a drawn patch is tried on every model that has a site.
        executor: Who looks: `local`, `ray`, `ray://HOST:PORT`, or an executor (see `running.executors`).
        progress: Told after every model.

    Raises:
        ModelFileError: There is no model in the folder.
    """
    root = Path(folder)
    models = sorted(path for path in root.rglob("*.onnx") if path.is_file())
    if not models:
        raise ModelFileError(
            str(root), expected="a folder with .onnx files", found="none in it", advice="Check the path."
        )
    items = [
        _Model(str(path), path.relative_to(root).as_posix(), _inputs(path, root, data), options, rehearsing)
        for path in models
    ]
    found: list[Looked] = []
    with executing(executor) as runs:
        for (kept,) in runs.team(_Nothing()).map(items):
            found.append(Looked.from_json(json.loads(str(kept["looked"]))))
            progress("looking at models", len(found), len(items))
    return tuple(found)


def _inputs(path: Path, root: Path, data: str | os.PathLike[str] | None) -> str | None:
    """Where a model's clean inputs are."""
    if data is None:
        return None
    stem = (Path(data) / path.relative_to(root)).with_suffix("")
    beside = (stem.with_name(stem.name + suffix) for suffix in _DATA)
    return next((str(place) for place in beside if place.exists()), None)


@dataclass(frozen=True)
class _Nothing:
    """A job without anything to open."""

    def open(self) -> None:
        """Nothing."""

    def shipped(self) -> "_Nothing":
        return self

    def key(self) -> bytes:
        return b"zoo"


@dataclass(frozen=True)
class _Model:
    """A model that is looked at; it and its inputs are read where that is done."""

    path: str
    name: str
    data: str | None
    options: ScanOptions | None
    rehearsing: bool

    @property
    def where(self) -> str:
        return self.name

    def run(self, opened: None) -> Iterator[Kept]:
        yield _kept(self._looked())

    def instead(self, error: AtPatchError) -> list[Kept]:
        return [_kept(Looked(self.name, error=str(error)))]

    def key(self) -> bytes:
        stamps = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in (self.path, self.data) if path]
        return key_of(stamps=stamps, options=self.options, rehearsing=self.rehearsing)

    def _looked(self) -> Looked:
        try:
            model = load(self.path)
            matches = explain(model)
        except AtPatchError as error:
            return Looked(self.name, error=str(error))
        reasons = Counter(miss.reason for miss in matches.near_misses if miss.attention)
        looked = Looked(
            self.name,
            sites=len(matches.sites),
            forms=tuple(sorted({site.form.value for site in matches.sites})),
            refused=tuple(sorted(reasons.items())),
        )
        if self.rehearsing and matches.sites:
            looked = replace(looked, rehearsed=_rehearsed(model))
        if self.data is None or not matches.sites:
            return looked
        try:
            found = scan(model, load_inputs(self.data), self.options)
        except AtPatchError as error:
            return replace(looked, scanned=str(error))
        return replace(looked, verdict=found.verdict.value, scanned=found.sentence)


def _rehearsed(model: ir.Model) -> str:
    found = rehearse(model, threads=1)
    if not found.runs:
        return f"does not run: {found.reason}"
    return "exact" if found.passed else f"fails: {', '.join(dict.fromkeys(check.name for check in found.failures))}"


def _kept(looked: Looked) -> Kept:
    return {"looked": np.array(json.dumps(looked.to_json()))}
