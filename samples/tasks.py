"""The tasks by the names of their cases."""

from pathlib import Path
from types import ModuleType

from atpatch_onnx.running.sessions import Progress, silent
from samples import fashion, sentiment, tables
from samples.case import Case, folder_of

TASKS: dict[str, ModuleType] = {"fashion": fashion, "sentiment": sentiment, "tables": tables}
"""Modules with `CASES` and `prepare`."""

CASES: dict[str, ModuleType] = {case: task for task in TASKS.values() for case in task.CASES}
"""The task of each case."""

HUNTED: dict[str, ModuleType] = dict.fromkeys(fashion.HUNTED_CASES, fashion)
"""The same of cases that are no part of the results: their triggers are only hunted for."""


def prepare(
    case: str, *, seed: int, fast: bool, out: Path, tune: bool = False, progress: Progress = silent
) -> tuple[Case, Path]:
    """A case, its base trained unless it is there, and the case's folder within `out`."""
    folder, task = folder_of(out, case, seed), (CASES | HUNTED)[case]
    prepared: Case = task.prepare(case, seed=seed, fast=fast, folder=folder, tune=tune, progress=progress)
    return prepared, folder
