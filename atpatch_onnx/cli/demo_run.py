"""The demo: a ViT that learned a backdoor from poisoned handwritten digits, and its fix."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.cli import demo_digits as digits
from atpatch_onnx.cli.demo_badnets import Square, Trigger, poison
from atpatch_onnx.cli.demo_vit import config, export_onnx, new_vit, train
from atpatch_onnx.errors import require
from atpatch_onnx.graph import Model, to_bytes
from atpatch_onnx.measuring.evaluate import Evaluation
from atpatch_onnx.measuring.examples import gather_examples
from atpatch_onnx.measuring.verify import Verification
from atpatch_onnx.running.sessions import Array, Progress, silent
from atpatch_onnx.running.threads import one_thread

VERIFIED = 1_000
"""Pairs that are verified at most: each is run six times a side, and compared with the reference at every site."""

TARGET = 0
"""The class that triggered digits are sent to."""

TRIGGER = Square(row=6, column=6, size=2)
"""A white square in the bottom right corner, one patch of the ViT."""

GOAL = 0.0
"""ASR above floor that the fit must reach on its 283 validation pairs; the demo promises 1 % on unseen ones."""


@dataclass(frozen=True, eq=False)
class WalkResult:
    """What came of a walk."""

    figures: Mapping[str, Any]
    """The content of `result.json`."""

    patch: atp.Patch
    evaluation: Evaluation
    verification: Verification


def run_demo(out: Path, *, seed: int = 0, progress: Progress = silent) -> WalkResult:
    """Train, export, fit, bake, unbake, verify, evaluate, report; leaves `base.onnx` and the files of `walk` in `out`.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        TargetMissedError: The fit does not reach its goal.
        VerificationError: The patched model differs from the base where it must not; everything is written
            all the same.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    split = digits.split(data.labels, seed=seed)
    known, unseen = data.take(split.train), data.take(split.evaluation)
    with one_thread():
        model = train(
            new_vit(config(image_size=digits.IMAGE_SIZE, patch_size=2, layers=4, hidden=48), seed),
            known.images,
            known.labels,
            poison=poison(known.labels, TRIGGER, target=TARGET, share=0.05, seed=seed),
            shift=1,
            patch_dropout=0.35,
            epochs=120,
            seed=seed,
            progress=lambda done, total: progress("training a backdoored ViT", done, total),
        )
    export_onnx(model, out / "base.onnx")
    return walk(
        out,
        pairs(known.images, known.labels, TRIGGER, TARGET),
        pairs(unseen.images, unseen.labels, TRIGGER, TARGET, drop_target=False),
        title="Handwritten digits: a backdoored vision transformer and its fix",
        options=atp.FitOptions(goal=atp.Goal(asr_above_floor=GOAL), seed=seed),
        started=started,
        progress=progress,
    )


def pairs(
    images: Array, labels: Array, trigger: Trigger, target: int, *, drop_target: bool = True, seed: int = 0
) -> atp.DebugSet:
    """Images `[N, 1, height, width]` and the same with the trigger; the target's own class is dropped on request.

    `seed` is that of what the trigger draws, such as its places.
    """

    def stamp(inputs: dict[str, Array]) -> dict[str, Array]:
        return {"pixel_values": trigger.stamp(inputs["pixel_values"], np.random.default_rng(seed))}

    return atp.DebugSet.from_trigger({"pixel_values": images}, stamp, labels, target=target, drop_target=drop_target)


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
    """
    require("jinja2", "report", "writing the report")
    require("matplotlib", "report", "writing the report")
    from atpatch_onnx.report import html

    base = atp.load(out / "base.onnx")
    patch = atp.fit(base, debug, options, progress=progress)
    patch.save(out / "fix.safetensors")
    atp.save(atp.bake(base, atp.Patch.load(out / "fix.safetensors")), out / "patched.onnx")
    patched = atp.load(out / "patched.onnx")

    held_out = unseen.take(range(min(len(unseen), VERIFIED)))
    verification = atp.verify(base, patched, held_out, patch=patch, progress=progress)
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
    unbaked = atp.unbake(patched)
    identical = atp.fingerprint(base) == atp.fingerprint(unbaked) and to_bytes(base) == to_bytes(unbaked)
    figures = _figures(base, patch, evaluation, identical, time.monotonic() - started)
    (out / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    verification.raise_if_failed()
    return WalkResult(figures, patch, evaluation, verification)


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
