"""A hidden unit, and edits of some of them as a patch holds them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from atpatch_onnx.matching.hidden import HiddenLayer
from atpatch_onnx.patches.patch import LayerEdit


@dataclass(frozen=True, order=True)
class Unit:
    """One hidden unit; ordered as the graph has them."""

    layer: int
    """Position of its layer among those of the model."""

    unit: int
    """Its place on the last axis of the layer's value."""


def edits_of(
    layers: Sequence[HiddenLayer], units: Sequence[Unit], factor: ArrayLike, constant: ArrayLike
) -> tuple[LayerEdit, ...]:
    """Edits of `units`, each once: the layers in the order of the graph, their units ascending.

    Args:
        layers: All hidden layers of the model.
        units: Which units, in any order.
        factor: What each is multiplied with, `[units]`, or one number for all.
        constant: What is then added, alike.
    """
    factors, constants = (np.broadcast_to(np.asarray(array, np.float32), len(units)) for array in (factor, constant))
    rows = sorted(range(len(units)), key=lambda row: units[row])
    edits = []
    for number in sorted({unit.layer for unit in units}):
        own = [row for row in rows if units[row].layer == number]
        numbers = np.array([units[row].unit for row in own], np.int64)
        edits.append(LayerEdit(layers[number].name, numbers, factors[own], constants[own]))
    return tuple(edits)
