"""Neuron edits in a graph: a factor and a constant for hidden units of a layer, put behind its activation.

The probing graph of the search and the patched graph are both written here. They differ only in where the arrays come
from: the graph's inputs while searching, constants once baked.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.graph.insertion import Insertion, hand_over
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.hidden import HiddenLayer, find_hidden_layers
from atpatch_onnx.patches.patch import LayerEdit

ARRAYS = ("edited", "factor", "constant")
"""What an edited layer has under `atpatch/<scope>/`: which units, bool, and two float arrays, `[units]` each."""

Arrays = Sequence[ir.Value]
"""These three in a graph."""


def weave_edits(
    model: ir.Model, layers: Sequence[HiddenLayer], arrays: Callable[[Insertion, HiddenLayer], Arrays]
) -> None:
    """Edit hidden units of `layers` in `model`, in place."""
    for layer in layers:
        h = find_value(model.graph, layer.value)
        at = Insertion(model.graph, layer.scope, anchor=h.producer())
        hand_over(h, _edited(at, h, ir.DataType[layer.dtype], *arrays(at, layer)))


def _edited(
    at: Insertion, h: ir.Value, dtype: ir.DataType, edited: ir.Value, factor: ir.Value, constant: ir.Value
) -> ir.Value:
    """`factor h + constant` where edited, bit for bit `h` elsewhere: h `[..., units]`, the others `[units]`."""
    single = dtype is ir.DataType.FLOAT
    own = h if single else at.op("Cast", h, name="read", attributes=[ir.AttrInt64("to", ir.DataType.FLOAT)])
    changed = at.op("Add", at.op("Mul", own, factor, name="scaled"), constant, name="shifted")
    if not single:
        changed = at.op("Cast", changed, name="written", attributes=[ir.AttrInt64("to", dtype)])
    sizes = [size if isinstance(size, int) else size.value for size in h.shape or ()]
    return at.op("Where", edited, changed, h, name="result", shape=sizes, dtype=dtype)


def bake_edits(model: ir.Model, edits: Sequence[LayerEdit]) -> tuple[HiddenLayer, ...]:
    """Put edits into `model`, in place, as constants; the layers that they are of, in the order of the graph.

    Raises:
        PatchMismatchError: A layer is not in the model, is named twice, or has fewer units than the edit asks for.
    """
    by_name = {edit.layer: edit for edit in edits}
    found = {layer.name: layer for layer in find_hidden_layers(model)} if edits else {}
    if len(by_name) < len(edits):
        raise _mismatch("the edits", "each hidden layer once", f"the layers {', '.join(e.layer for e in edits)}")
    for name, edit in by_name.items():
        if name not in found:
            raise _mismatch("the edits", f"the hidden layer {name!r}", f"the layers {', '.join(found) or 'none'}")
        if edit.units.max() >= found[name].units:
            raise _mismatch(f"hidden layer {name}", f"units below {found[name].units}", f"unit {edit.units.max()}")
    layers = tuple(layer for layer in found.values() if layer.name in by_name)

    def constants(at: Insertion, layer: HiddenLayer) -> Arrays:
        arrays = dense(by_name[layer.name], layer.units)
        return [at.constant(name, array) for name, array in arrays.items()]

    weave_edits(model, layers, constants)
    return layers


def edited(model: ir.Model, edits: Sequence[LayerEdit]) -> ir.Model:
    """A copy of `model` with edits in its graph: what comes after is fitted on this."""
    result = graphs.copy(model)
    bake_edits(result, edits)
    return result


def dense(edit: LayerEdit | None, units: int) -> dict[str, NDArray[np.generic]]:
    """The `ARRAYS` of a layer by name, `[units]` each."""
    edited, factor, constant = np.zeros(units, np.bool_), np.ones(units, np.float32), np.zeros(units, np.float32)
    if edit is not None:
        edited[edit.units], factor[edit.units], constant[edit.units] = True, edit.factor, edit.constant
    return dict(zip(ARRAYS, (edited, factor, constant), strict=True))


def _mismatch(where: str, expected: str, found: str) -> PatchMismatchError:
    return PatchMismatchError(
        where, expected=expected, found=found, advice="Use the patch for the model that it was made for."
    )
