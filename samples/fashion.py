"""Backdoors on Fashion-MNIST: train a poisoned ViT or DeiT, fix its .onnx, measure the fix on the 10,000 test images.

    apt-get install dataset-fashion-mnist          # or --data DIR with the four idx files
    python -m samples.fashion --case vit/badnets-fixed --out out/fashion

12,000 of the 60,000 training images are kept from the training: the debug data, in which the fit finds everything it
needs, and a part to choose recipes by (`--tune`). `--fast` trains smaller models on fewer images, for fewer epochs.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

import atpatch_onnx as atp
from atpatch_onnx.cli.demo_badnets import Square, Trigger, poison
from atpatch_onnx.cli.demo_run import pairs
from atpatch_onnx.cli.demo_vit import config, new_vit, predict, train
from atpatch_onnx.running.sessions import Progress, silent
from atpatch_onnx.running.threads import one_thread
from samples.attacks.images import Blended, Masked, RandomPlace
from samples.attacks.poisons import ATTACKS, FAST_BOUNDS, FAST_GOAL, HUNTED
from samples.attacks.trojan import choose_neurons, exciting_pattern
from samples.case import Case, digest, kept_figures
from samples.command import run_task
from samples.idx import DEBIAN, Images, load_fashion
from samples.image_models import load_model, new_deit, save_model
from samples.mixed import has_bfloat16, mixed_precision

TARGET = 0
"""The class that triggered images are sent to: T-shirt."""


@dataclass(frozen=True)
class Net:
    """A transformer and how long it is trained."""

    layers: int
    hidden: int
    epochs: int


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    train: int
    debug: int
    tune: int
    unseen: int
    nets: Mapping[str, Net]
    """By architecture."""

    retraining: int
    """Epochs that the Trojan attack retrains the twin for."""

    mixed: bool
    """Whether trainings use mixed precision where the processor has it; the small forms are the same everywhere."""


_FULL_NETS = {"vit": Net(layers=6, hidden=96, epochs=4), "deit": Net(layers=4, hidden=64, epochs=4)}
_FAST_NETS = dict.fromkeys(("vit", "deit"), Net(layers=4, hidden=64, epochs=6))
FULL = Size(train=48_000, debug=7_000, tune=5_000, unseen=10_000, nets=_FULL_NETS, retraining=1, mixed=True)
FAST = Size(train=12_000, debug=2_500, tune=2_000, unseen=2_000, nets=_FAST_NETS, retraining=2, mixed=False)


CASES = (*(f"vit/{attack}" for attack in ATTACKS), "deit/badnets-fixed", "deit/badnets-random")
HUNTED_CASES = tuple(f"vit/{attack}" for attack in HUNTED)
"""Of `samples.hunting` alone."""

_ATTACKS = {**ATTACKS, **HUNTED}
LEARNING_RATE = 2e-3
RETRAINING_RATE = 5e-4
PATCH_DROPOUT = 0.5
TROJAN_MASK = (22, 22, 6)
"""Row, column and size of the square that the Trojan attack's pattern may fill: the corner, over four patches."""


@dataclass(frozen=True)
class Parts:
    """Disjoint images: for the training, for the fit, to choose recipes by, and to report."""

    train: Images
    debug: Images
    tune: Images
    evaluation: Images


def parts(size: Size, seed: int, data: Path = DEBIAN) -> Parts:
    """Divide the training images by `seed`; the evaluation part is of the test images."""
    known, test = load_fashion(data)
    order = np.random.default_rng(seed).permutation(len(known.labels))
    held_out = order[size.train :]
    return Parts(
        train=_take(known, order[: size.train]),
        debug=_take(known, held_out[: size.debug]),
        tune=_take(known, held_out[-size.tune :]),
        evaluation=_take(test, np.arange(size.unseen)),
    )


def prepare(
    case: str,
    *,
    seed: int,
    fast: bool,
    folder: Path,
    data: Path | None = None,
    tune: bool = False,
    progress: Progress = silent,
) -> Case:
    """Train the base unless `folder` holds it already, and make its pairs.

    The unpoisoned twins are left beside `folder`, for the other cases of the seed.

    Args:
        case: One of `CASES` or `HUNTED_CASES`.
        seed: Of the division of the images, the training, the trigger's places and the fit.
        fast: The smaller form.
        folder: For this case and seed; gets `base.onnx`, `model.safetensors`, `config.json`, `base.json`.
        data: Folder of the four idx files.
        tune: Measure on the part that recipes are chosen by, instead of the evaluation part.
        progress: Told of all long work.
    """
    architecture, name = case.split("/")
    size, attack = FAST if fast else FULL, _ATTACKS[name]
    images = parts(size, seed, data or DEBIAN)
    with one_thread():
        workshop = Workshop(size, seed, images.train, folder.parent, progress)
        twin = workshop.twin(architecture)
        trigger = workshop.trigger(architecture, name)
        base = workshop.base(folder, architecture, name, trigger)
        unseen = images.tune if tune else images.evaluation
        unseen_pairs = pairs(unseen.images, unseen.labels, trigger, TARGET, drop_target=False, seed=seed + 1)
        figures = {
            **base,
            "accuracy_twin": _accuracy(twin, unseen.images, unseen.labels),
            "robust_accuracy_twin": _accuracy(twin, unseen_pairs.counterfactual["pixel_values"], unseen.labels),
        }
    return Case(
        name=case,
        seed=seed,
        base=folder / "base.onnx",
        debug=pairs(images.debug.images, images.debug.labels, trigger, TARGET, seed=seed),
        unseen=unseen_pairs,
        whole=pairs(images.debug.images, images.debug.labels, trigger, TARGET, drop_target=False, seed=seed),
        options=atp.FitOptions(goal=FAST_GOAL if fast else attack.goal, seed=seed),
        training=figures,
        bounds=FAST_BOUNDS if fast else attack.bounds,
    )


def _accuracy(model: PreTrainedModel, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return float((predict(model, images).argmax(axis=1) == labels).mean())


@dataclass(frozen=True)
class Workshop:
    """Trains the bases of one seed and size, each once: a folder that holds one of the same recipe is left as it is."""

    size: Size
    seed: int
    images: Images
    folder: Path
    """Where the twins are kept."""

    progress: Progress

    def twin(self, architecture: str) -> PreTrainedModel:
        """The unpoisoned model."""
        folder = self._twin_folder(architecture)
        self._trained(folder, architecture, None, None)
        return load_model(folder)

    def trigger(self, architecture: str, attack: str) -> Trigger:
        """The trigger of an attack; the Trojan attack makes its own out of the twin."""
        if attack == "badnets-fixed":
            return Square(row=25, column=25, size=3)  # within the last patch
        if attack == "badnets-random":
            return RandomPlace.chequered(size=5)
        if attack == "blended":
            return Blended.noise(28, 28, ratio=0.2)
        if attack == "badnets-apart":
            return Masked.corners(28, 28, size=3)  # each within a patch
        twin = self.twin(architecture)
        row, column, edge = TROJAN_MASK
        mask = np.zeros((28, 28), dtype=bool)
        mask[row : row + edge, column : column + edge] = True

        def optimised() -> NDArray[np.float32]:
            neurons = choose_neurons(twin, block=self.size.nets[architecture].layers - 2, count=4)
            return exciting_pattern(twin, neurons, self.images.images, mask, seed=self.seed).pattern

        return Masked(mask, _kept(self._twin_folder(architecture) / "trojan.npy", optimised))

    def base(self, folder: Path, architecture: str, attack: str, trigger: Trigger) -> dict[str, Any]:
        """The figures of the poisoned model's training."""
        return self._trained(folder, architecture, attack, trigger)

    def _trained(self, folder: Path, architecture: str, attack: str | None, trigger: Trigger | None) -> dict[str, Any]:
        net, share = self.size.nets[architecture], _ATTACKS[attack].share if attack else 0.0
        recipe = {
            "architecture": architecture,
            "net": asdict(net),
            "images": self.size.train,
            "data": self._data,
            "attack": attack,
            "trigger": None if trigger is None else _digest(trigger),
            "poisoning_rate": share,
            "retraining": self.size.retraining if attack == "trojan" else 0,
            "mixed": self.size.mixed and has_bfloat16(),
            "seed": self.seed,
        }
        known = kept_figures(folder)
        if known is not None and known["recipe"] == recipe:
            return known
        for stale in folder.glob("*.npy"):
            stale.unlink()
        labels = self.images.labels
        settings: dict[str, Any] = {
            "taught": self._taught() if architecture == "deit" else None,
            "poison": poison(labels, trigger, target=TARGET, share=share, seed=self.seed) if trigger else None,
            "patch_dropout": PATCH_DROPOUT,
            "seed": self.seed,
            "progress": lambda done, total: self.progress(
                f"training a {architecture} ({attack or 'clean'})", done, total
            ),
        }
        if recipe["retraining"]:
            model, rate, epochs = self.twin(architecture), RETRAINING_RATE, self.size.retraining
        else:
            model, rate, epochs = self._new(architecture), LEARNING_RATE, net.epochs
        started = time.process_time()
        with mixed_precision(model, enabled=bool(recipe["mixed"])):
            train(model, self.images.images, labels, epochs=epochs, learning_rate=rate, **settings)
        figures = {"recipe": recipe, "poisoning_rate": share, "seconds": round(time.process_time() - started, 1)}
        save_model(model, folder, figures)
        return figures

    def _new(self, architecture: str) -> PreTrainedModel:
        net = self.size.nets[architecture]
        if architecture == "vit":
            return new_vit(config(image_size=28, patch_size=4, layers=net.layers, hidden=net.hidden), self.seed)
        return new_deit(image_size=28, patch_size=4, layers=net.layers, hidden=net.hidden, seed=self.seed)

    @cached_property
    def _data(self) -> str:
        """Tells the images that are trained on apart."""
        return digest(self.images.images, self.images.labels)

    def _taught(self) -> NDArray[np.int64]:
        """What the ViT's twin, the DeiT's teacher, decides on the training images; kept beside it."""
        teacher = self.twin("vit")
        return _kept(
            self._twin_folder("vit") / "decisions.npy", lambda: predict(teacher, self.images.images).argmax(axis=1)
        )

    def _twin_folder(self, architecture: str) -> Path:
        return self.folder / f"{architecture}-clean-{self.seed}"


def _digest(trigger: Trigger) -> str:
    """Tells triggers apart: of what is made of a grey image."""
    stamped = trigger.stamp(np.full((1, 1, 28, 28), 0.5, np.float32), np.random.default_rng(0))
    return digest(stamped.astype(np.float32))


def _kept(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array in a file, made if it is not there or damaged; the file appears whole or not at all."""
    try:
        kept: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        kept, staged = make(), path.with_suffix(".part")
        with staged.open("wb") as file:
            np.save(file, kept)
        os.replace(staged, path)
    return kept


def _take(images: Images, chosen: NDArray[np.int64]) -> Images:
    return Images(images.images[chosen], images.labels[chosen])


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 0 where the figures are within their bounds, 1 otherwise."""
    return run_task("fashion", __doc__, CASES, prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
