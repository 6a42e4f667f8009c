"""The whole walk: train a backdoored ViT, export it, fit a patch, bake, strip, verify, evaluate, report."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atpatch_onnx as atp
from atpatch_onnx.demo import digits
from atpatch_onnx.demo.model import TARGET, TRIGGER, train_digits
from atpatch_onnx.demo.vit import export_onnx
from atpatch_onnx.errors import require
from atpatch_onnx.evaluate import Evaluation
from atpatch_onnx.examples import gather_examples
from atpatch_onnx.graph import Model, to_bytes
from atpatch_onnx.runtime import Array, Progress, silent
from atpatch_onnx.verify import Verification


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo measured."""

    figures: Mapping[str, Any]
    """The content of `result.json`."""

    patch: atp.Patch
    evaluation: Evaluation
    verification: Verification


def run_demo(out: Path, *, seed: int = 0, progress: Progress = silent) -> DemoResult:
    """Run the demo; `base.onnx`, `fix.safetensors`, `patched.onnx`, `report.html` and `result.json` are left in `out`.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        TargetMissedError: The fit does not reach its goal.
    """
    require("jinja2", "report", "the demo's report")
    require("matplotlib", "report", "the demo's report")
    from atpatch_onnx.report import html

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    split = digits.split(data.labels, seed=seed)
    known, unseen = data.take(split.train), data.take(split.evaluation)

    model = train_digits(known, seed=seed, progress=lambda done, total: progress("training the ViT", done, total))
    export_onnx(model, out / "base.onnx")
    base = atp.load(out / "base.onnx")

    patch = atp.fit(base, _pairs(known), atp.FitOptions(seed=seed), progress=progress)
    patch.save(out / "fix.safetensors")
    atp.save(atp.bake(base, atp.Patch.load(out / "fix.safetensors")), out / "patched.onnx")
    patched = atp.load(out / "patched.onnx")
    strip_identical = _identical(base, atp.strip(patched))

    evaluation_set = _pairs(unseen, drop_target=False)
    verification = atp.verify(base, patched, evaluation_set, progress=progress)
    evaluation = atp.evaluate(base, patched, evaluation_set, progress=progress)
    examples = gather_examples(base, patched, evaluation_set)
    seconds = time.monotonic() - started
    page = html.render_html(
        title="Handwritten digits: a backdoored vision transformer, fixed",
        patch=patch,
        evaluation=evaluation,
        verification=verification,
        examples=examples,
        seconds=seconds,
    )
    html.write_report(out / "report.html", page)
    figures = _figures(base, patch, evaluation, strip_identical, time.monotonic() - started)
    (out / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    verification.raise_if_failed()
    return DemoResult(figures, patch, evaluation, verification)


def _pairs(images: digits.Digits, *, drop_target: bool = True) -> atp.DebugSet:
    def trigger(inputs: dict[str, Array]) -> dict[str, Array]:
        return {"pixel_values": TRIGGER.stamp(inputs["pixel_values"])}

    return atp.DebugSet.from_trigger(
        {"pixel_values": images.images}, trigger, images.labels, target=TARGET, drop_target=drop_target
    )


def _identical(base: Model, stripped: Model) -> bool:
    """Whether the stripped model is the base: by fingerprint, and as a file, by every byte."""
    return atp.fingerprint(base) == atp.fingerprint(stripped) and to_bytes(base) == to_bytes(stripped)


def _figures(
    base: Model, patch: atp.Patch, evaluation: Evaluation, strip_identical: bool, seconds: float
) -> dict[str, Any]:
    backdoor = evaluation.backdoor
    assert backdoor is not None, "the demo's debug set is a backdoor's"
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
        "strip_identical": strip_identical,
        "seconds": round(seconds, 1),
    }
