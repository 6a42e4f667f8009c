"""BadNets on Fashion-MNIST: train a backdoored ViT, fix its .onnx, and measure the fix on the 10,000 test images.

    apt-get install dataset-fashion-mnist          # or --data DIR with the four idx files
    python -m samples.badnets_fashion --out out/fashion

5,000 of the 60,000 training images are kept from the training: they are the debug data, in which the fit finds
everything it needs. `--fast` trains on fewer images for fewer epochs and measures on 2,000: weaker figures, sooner.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.cli import progress_bars
from atpatch_onnx.demo.badnets import Trigger, poison
from atpatch_onnx.demo.run import pairs
from atpatch_onnx.demo.vit import config, export_onnx, train_vit
from atpatch_onnx.demo.walk import WalkResult, walk
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.report import text
from atpatch_onnx.runtime import Progress
from samples.idx import DEBIAN, Images, load_fashion

TARGET = 0
TRIGGER = Trigger(row=25, column=25, size=3)
"""A 3 x 3 square in the bottom right corner; it lies within the last patch."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    train: int
    debug: int
    unseen: int
    epochs: int
    layers: int
    goal: atp.Goal
    """What the fit must reach on its validation part."""

    bounds: dict[str, float]
    """What the figures must reach, as shares: the sample fails otherwise."""


FULL = Size(
    train=55_000,
    debug=5_000,
    unseen=10_000,
    epochs=6,
    layers=6,
    goal=atp.Goal(asr_above_floor=0.003, accuracy_loss=0.001),
    bounds={"asr_above_floor": 0.003, "accuracy_lost": 0.001, "robust_below_clean": 0.005},
)
FAST = Size(
    train=20_000,
    debug=2_500,
    unseen=2_000,
    epochs=4,
    layers=6,
    goal=atp.Goal(asr_above_floor=0.01, accuracy_loss=0.005),
    bounds={"asr_above_floor": 0.01, "accuracy_lost": 0.005, "robust_below_clean": 0.02},
)


def main(arguments: list[str] | None = None) -> int:
    """Run the sample; 0 where the figures are within their bounds, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four idx files")
    parser.add_argument("--out", type=Path, default=Path("out/fashion"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="fewer images and epochs: weaker figures, sooner")
    options = parser.parse_args(arguments)
    try:
        with progress_bars() as progress:
            result = run(options.data, options.out, FAST if options.fast else FULL, options.seed, progress)
    except AtPatchError as error:
        print(f"badnets_fashion: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(text.fit_table(result.patch), text.evaluation_table(result.evaluation))
    missed = shortfalls(result, (FAST if options.fast else FULL).bounds)
    for line in missed:
        console.print(line)
    console.print(f"{result.figures['seconds']:.0f} s; everything is in {options.out}")
    return 1 if missed else 0


def run(data: Path, out: Path, size: Size, seed: int, progress: Progress) -> WalkResult:
    """Train on one part, fit on the held-out one, measure on the test images."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    train, test = load_fashion(data)
    order = np.random.default_rng(seed).permutation(len(train.labels))
    known, held_out = _take(train, order[: size.train]), _take(train, order[-size.debug :])
    unseen = _take(test, np.arange(size.unseen))
    model = train_vit(
        known.images,
        known.labels,
        config(image_size=28, patch_size=4, layers=size.layers, hidden=96),
        poison=poison(known.labels, TRIGGER, target=TARGET, share=0.05, seed=seed),
        epochs=size.epochs,
        learning_rate=2e-3,
        patch_dropout=0.5,
        seed=seed,
        progress=lambda done, total: progress("training a backdoored ViT", done, total),
    )
    export_onnx(model, out / "base.onnx")
    return walk(
        out,
        pairs(held_out.images, held_out.labels, TRIGGER, TARGET),
        pairs(unseen.images, unseen.labels, TRIGGER, TARGET, drop_target=False),
        title="Fashion-MNIST: a backdoored vision transformer and its fix",
        options=atp.FitOptions(goal=size.goal, seed=seed),
        started=started,
        progress=progress,
    )


def shortfalls(result: WalkResult, bounds: dict[str, float]) -> list[str]:
    """Figures beyond their bounds, a line each."""
    figures = result.figures
    found = {
        "asr_above_floor": figures["asr_above_floor"],
        "accuracy_lost": figures["accuracy_base"] - figures["accuracy_patched"],
        "robust_below_clean": figures["accuracy_patched"] - figures["robust_accuracy_patched"],
    }
    return [
        f"MISSED: {name} is {found[name]:.4f}, the bound is {bound}"
        for name, bound in bounds.items()
        if found[name] > bound
    ]


def _take(images: Images, chosen: np.ndarray) -> Images:
    return Images(images.images[chosen], images.labels[chosen])


if __name__ == "__main__":
    sys.exit(main())
