"""From a base file and its pairs to everything the product makes: patch, patched file, report and figures."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atpatch_onnx as atp
from atpatch_onnx.errors import require
from atpatch_onnx.graph import Model, to_bytes
from atpatch_onnx.measuring.evaluate import Evaluation
from atpatch_onnx.measuring.examples import gather_examples
from atpatch_onnx.measuring.verify import Verification
from atpatch_onnx.running.sessions import Progress, silent

VERIFIED = 1_000
"""Pairs that are verified at most: each is run six times a side, and compared with the reference at every site."""


@dataclass(frozen=True, eq=False)
class WalkResult:
    """What came of a walk."""

    figures: Mapping[str, Any]
    """The content of `result.json`."""

    patch: atp.Patch
    evaluation: Evaluation
    verification: Verification


def walk(
    out: Path,
    debug: atp.DebugSet,
    unseen: atp.DebugSet,
    *,
    title: str,
    options: atp.FitOptions,
    started: float,
    progress: Progress = silent,
) -> WalkResult:
    """Fit, bake, unbake, verify, evaluate and report `out/base.onnx`.

    Leaves `fix.safetensors`, `patched.onnx`, `report.html` and `result.json` in `out`.

    Args:
        out: The folder that holds `base.onnx`.
        debug: Pairs for the fit.
        unseen: Pairs that neither the training nor the fit saw, with labels.
        title: The heading of the report.
        options: Of the fit.
        started: `time.monotonic()` at the start of everything, training included.
        progress: Told of all long work.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        TargetMissedError: The fit does not reach its goal.
        VerificationError: The patched model differs from the base where it must not; everything is written
            all the same.
    """
    require("jinja2", "report", "writing the report")
    require("matplotlib", "report", "writing the report")
    from atpatch_onnx.report import html

    base = atp.load(out / "base.onnx")
    patch = atp.fit(base, debug, options, progress=progress)
    patch.save(out / "fix.safetensors")
    atp.save(atp.bake(base, atp.Patch.load(out / "fix.safetensors")), out / "patched.onnx")
    patched = atp.load(out / "patched.onnx")

    verification = atp.verify(base, patched, unseen.take(range(min(len(unseen), VERIFIED))), progress=progress)
    evaluation = atp.evaluate(base, patched, unseen, progress=progress)
    page = html.render_html(
        title=title,
        patch=patch,
        evaluation=evaluation,
        verification=verification,
        examples=gather_examples(base, patched, unseen),
        seconds=time.monotonic() - started,
    )
    html.write_report(out / "report.html", page)
    identical = _identical(base, atp.unbake(patched))
    figures = _figures(base, patch, evaluation, identical, time.monotonic() - started)
    (out / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    verification.raise_if_failed()
    return WalkResult(figures, patch, evaluation, verification)


def _identical(base: Model, unbaked: Model) -> bool:
    """Whether the unbaked model is the base: by fingerprint, and as a file, by every byte."""
    return atp.fingerprint(base) == atp.fingerprint(unbaked) and to_bytes(base) == to_bytes(unbaked)


def _figures(base: Model, patch: atp.Patch, evaluation: Evaluation, identical: bool, seconds: float) -> dict[str, Any]:
    backdoor = evaluation.backdoor
    assert backdoor is not None, "walks are about backdoors"
    assert evaluation.columns is not None, "walks fit a detector"
    return {
        "accuracy_base": evaluation.accuracy_base.value,
        "accuracy_patched": evaluation.accuracy_patched.value,
        "asr_base": backdoor.asr_base.value,
        "asr_patched": backdoor.asr_patched.value,
        "asr_floor": backdoor.asr_floor.value,
        "asr_above_floor": backdoor.asr_above_floor.value,
        "robust_accuracy_patched": backdoor.robust_accuracy_patched.value,
        "precision": evaluation.columns.precision.value,
        "recall": evaluation.columns.recall.value,
        "clean_flag_rate": evaluation.clean_flag_rate.value,
        "sites_total": len(atp.find_sites(base)),
        "sites_patched": len(patch.sites),
        "clean_bit_identical": evaluation.clean_bit_identical,
        "unbake_identical": identical,
        "seconds": round(seconds, 1),
    }
