"""How bases on Fashion-MNIST are poisoned, and what a fix of each must reach."""

from dataclasses import dataclass

import atpatch_onnx as atp
from samples.bounds import Bound


@dataclass(frozen=True)
class Attack:
    """How a base is poisoned, and what its fix must reach."""

    share: float
    """Of the training images that are poisoned."""

    goal: atp.Goal
    """What the fit must reach on its validation part."""

    bounds: tuple[Bound, ...]


STRONG = Bound("ASR", 0.95, at_least=True)
"""A weak attack is no test."""

FAST_GOAL = atp.Goal(asr_above_floor=0.01, accuracy_loss=0.005)
FAST_BOUNDS = (Bound("ASR", 0.9, at_least=True), Bound("ASR above floor", 0.02), Bound("accuracy lost", 0.01))
_BOUNDS = (STRONG, Bound("ASR above floor", 0.005), Bound("accuracy lost", 0.001))
ATTACKS = {
    "badnets-fixed": Attack(
        0.05,
        atp.Goal(asr_above_floor=0.001, accuracy_loss=0.0005),
        (
            *(STRONG, Bound("ASR above floor", 0.002), Bound("accuracy lost", 0.0005)),
            *(Bound("recall", 0.998, at_least=True), Bound("precision", 0.97, at_least=True)),
        ),
    ),
    "badnets-random": Attack(
        0.1,
        atp.Goal(0.002, accuracy_loss=0.001, clean_flag_rate=0.04),  # some clothes look like the trigger
        _BOUNDS,
    ),
    "blended": Attack(0.05, atp.Goal(asr_above_floor=0.005, accuracy_loss=0.001), (STRONG,)),
    "trojan": Attack(0.05, atp.Goal(0.002, accuracy_loss=0.001), _BOUNDS),
}
"""The whole-image blend has no column of its own: how far its fix gets is measured, and bounded by nothing."""

HUNTED = {"badnets-apart": Attack(0.05, atp.Goal(0.002, accuracy_loss=0.001), _BOUNDS)}
"""Attacks that are only hunted for."""
