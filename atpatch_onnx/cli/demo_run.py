"""The demo: a ViT that learned a backdoor from poisoned handwritten digits, and its fix."""

import time
from pathlib import Path

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.cli import demo_digits as digits
from atpatch_onnx.cli.demo_badnets import Square, Trigger, poison
from atpatch_onnx.cli.demo_vit import config, export_onnx, new_vit, train
from atpatch_onnx.cli.demo_walk import WalkResult, walk
from atpatch_onnx.running.sessions import Array, Progress, silent
from atpatch_onnx.running.threads import one_thread

TARGET = 0
"""The class that triggered digits are sent to."""

TRIGGER = Square(row=6, column=6, size=2)
"""A white square in the bottom right corner, one patch of the ViT."""

GOAL = 0.0
"""ASR above floor that the fit must reach on its 283 validation pairs; the demo promises 1 % on unseen ones."""


def run_demo(out: Path, *, seed: int = 0, progress: Progress = silent) -> WalkResult:
    """Train, export, fit, bake, unbake, verify, evaluate, report; leaves `base.onnx` and the files of `walk` in `out`.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        TargetMissedError: The fit does not reach its goal.
        VerificationError: The patched model differs from the base where it must not.
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
