"""One case of a task: a base with something wrong in it, its pairs, and what our fix makes of it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import atpatch_onnx as atp
from atpatch_onnx.errors import VerificationError
from atpatch_onnx.graph import to_bytes
from atpatch_onnx.measuring.evaluate import Evaluation
from atpatch_onnx.measuring.verify import Verification
from atpatch_onnx.running.sessions import Progress, silent
from samples.bounds import Bound

VERIFIED = 200
"""Pairs that are verified at most: each is run six times a side, and compared with the reference at every site."""

EVALUATION_SEED = 0
"""Draws the evaluation part, whatever the case's seed: no seed trains or tunes on what another one reports."""


@dataclass(frozen=True, eq=False)
class Case:
    """What a task hands over."""

    name: str
    """Such as `vit/badnets-fixed`."""

    seed: int
    base: Path
    """The base, an `.onnx` file."""

    debug: atp.DebugSet
    """Pairs for the fit, of inputs that the training did not see."""

    unseen: atp.DebugSet
    """Pairs with labels that neither the training nor the fit saw."""

    options: atp.FitOptions
    """Of the fit."""

    training: Mapping[str, Any] = field(default_factory=dict)
    """Figures of the training: poisoning rate, accuracy of the unpoisoned twin (`accuracy_twin`), seconds, ..."""

    bounds: tuple[Bound, ...] = ()
    """What the figures must reach; the task's command fails otherwise."""

    whole: atp.DebugSet | None = None
    """As `debug`, inputs of the target's class among them, where `debug` leaves these out: neuron edits may make a
    model forget that class."""

    further: Callable[[Path], Mapping[str, Any]] = lambda patched: {}
    """Figures of this task alone, JSON types, from the patched file."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What came of a case."""

    case: Case
    patch: atp.Patch
    evaluation: Evaluation
    verification: Verification
    unbake_identical: bool
    more: Mapping[str, Any]
    """What `Case.further` found."""

    seconds: Mapping[str, float]
    """Of `fit`, `bake`, `verify` and `evaluate`."""

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return {
            "case": self.case.name,
            "seed": self.case.seed,
            "training": dict(self.case.training),
            "evaluation": self.evaluation.to_json(),
            "verified": self.verification.passed,
            "unbake_identical": self.unbake_identical,
            "more": dict(self.more),
            "fit": dict(self.patch.figures),
            "seconds": dict(self.seconds),
        }


def folder_of(out: Path, case: str, seed: int) -> Path:
    """The folder of a case and seed within `out`."""
    return out / f"{case.replace('/', '-')}-{seed}"


def digest(*arrays: NDArray[Any]) -> str:
    """What tells the data of a base apart: the first 16 hexadecimal digits of SHA-256 over the arrays' bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:16]


def kept_figures(folder: Path) -> dict[str, Any] | None:
    """The figures in `base.json`, which is written after all other files of a base.

    None where the folder holds no whole base: the file is missing, damaged or without a recipe.
    """
    try:
        figures = json.loads((folder / "base.json").read_text())
    except (OSError, ValueError):
        return None
    return figures if isinstance(figures, dict) and "recipe" in figures else None


def measure(case: Case, folder: Path, *, force: bool = False, progress: Progress = silent) -> Measured:
    """Fit, bake, unbake, verify and evaluate; leaves `fix.safetensors` and `patched.onnx` in `folder`.

    Args:
        case: The base and its pairs.
        folder: Made if it is not there.
        force: Go on with a patch that misses the goal of its fit.
        progress: Told of all long work.

    Raises:
        TargetMissedError: The fit does not reach its goal, and `force` is not set.
        VerificationError: The patched model differs from the base where it must not, or does not unbake to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    base = atp.load(case.base)
    options = replace(case.options, force=case.options.force or force)
    with clock("fit"):
        patch = atp.fit(base, case.debug, options, progress=progress)
    patch.save(folder / "fix.safetensors")
    with clock("bake"):
        atp.save(atp.bake(base, atp.Patch.load(folder / "fix.safetensors")), folder / "patched.onnx")
    patched = atp.load(folder / "patched.onnx")
    with clock("verify"):
        verification = atp.verify(
            base, patched, case.unseen.take(range(min(len(case.unseen), VERIFIED))), progress=progress
        )
    verification.raise_if_failed()
    with clock("evaluate"):
        evaluation = atp.evaluate(base, patched, case.unseen, progress=progress)
        more = case.further(folder / "patched.onnx")
    unbaked = atp.unbake(patched)
    identical = atp.fingerprint(base) == atp.fingerprint(unbaked) and to_bytes(base) == to_bytes(unbaked)
    if not identical:
        raise VerificationError(
            "the unbaked model",
            expected="the base, byte for byte",
            found=f"another model, of fingerprint {atp.fingerprint(unbaked)}",
            advice="Do not ship the patched file: what is in it besides the patch is unknown.",
        )
    return Measured(case, patch, evaluation, verification, identical, more, clock.seconds)


class _Clock:
    """How long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - started, 1)
