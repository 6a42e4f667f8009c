"""The probing graph of neuron edits: factor and constant of every hidden unit as inputs.

One graph and one session serve the whole search: which units are edited, and how.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.edits import Arrays, dense, weave_edits
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import own_name
from atpatch_onnx.graph.parts import require_opset
from atpatch_onnx.matching import batching
from atpatch_onnx.matching.hidden import HiddenLayer
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.sessions import Array, Progress, Session, silent


class NeuronTrial:
    """A session of the probing graph.

    Args:
        model: The base.
        layers: Its hidden layers, all that may be edited.
        output: Name of the output that predictions are read from.

    Raises:
        BakeError: The model's opset is too old.
    """

    def __init__(self, model: ir.Model, layers: Sequence[HiddenLayer], output: str) -> None:
        require_opset(model)
        trial = graphs.copy(model)
        weave_edits(trial, layers, _inputs)
        self.layers = tuple(layers)
        self._output = output
        self._session = Session(trial, batching=batching(model))

    def run(
        self,
        inputs: Mapping[str, Array],
        edits: Sequence[LayerEdit] = (),
        *,
        batch_size: int = 32,
        progress: Progress = silent,
        stage: str = "trying edits",
    ) -> Array:
        """Logits `[samples, classes]` of inputs `[samples, ...]` under some edits; without any, the base's.

        Raises:
            PatchMismatchError: An edit is of a layer that the trial does not have.
        """
        by_name = {edit.layer: edit for edit in edits}
        unknown = by_name.keys() - {layer.name for layer in self.layers}
        if unknown:
            raise PatchMismatchError(
                "the edits",
                expected=f"some of the layers {', '.join(layer.name for layer in self.layers)}",
                found=", ".join(sorted(unknown)),
                advice="Edit hidden layers of the model that is tried.",
            )
        constants: dict[str, Array] = {}
        for layer in self.layers:
            for name, array in dense(by_name.get(layer.name), layer.units).items():
                constants[_name(layer, name)] = array
        outputs = self._session.collect(
            inputs, [self._output], batch_size=batch_size, constants=constants, progress=progress, stage=stage
        )
        return outputs[self._output]


def _name(layer: HiddenLayer, array: str) -> str:
    return own_name(layer.scope, array)


def _inputs(at: Insertion, layer: HiddenLayer) -> Arrays:
    """What edits are made of, as inputs of the graph."""
    values = []
    for name, array in dense(None, layer.units).items():
        type_ = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        values.append(ir.Value(name=_name(layer, name), shape=ir.Shape([layer.units]), type=type_))
        at.graph.inputs.append(values[-1])
    return values
