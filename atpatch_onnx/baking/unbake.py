"""Take a patch out of a model again. What remains is the base, and its fingerprint proves it."""

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import PatchRecord, read_record
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.insertion import hand_back
from atpatch_onnx.graph.names import ENTRY, PREFIX, REPLACES_KEY, SITE_KEY


def unbake(model: ir.Model) -> ir.Model:
    """A copy of a patched model without the patch: equal to the base, node for node and weight for weight.

    Raises:
        UnbakeError: The model is not patched, or what remains is not the base that it names.
    """
    record = read_record(model)
    missing = graphs.undefined_value(model)
    if missing is not None:
        raise _tampered("the patched model", "a complete graph", f"the value {missing!r} used before it is there")
    two = graphs.branches(model)
    try:
        if two is None:
            base = graphs.copy(model)
            for step in _STEPS:
                step(base, record)
        else:
            base = graphs.joined(model, {name: unbake(graphs.branch(model, name)) for name in two})
            _remove_metadata(base, record)
    except (ValueError, TypeError) as error:  # onnx-ir's, where nodes still hold on to what is to be removed
        raise _tampered("the patched model", "a patch that comes out whole", str(error)) from error
    found = graphs.fingerprint(base)
    if found != record.base:
        raise _tampered("the unbaked model", f"the base {record.base}", f"a model with the fingerprint {found}")
    return base


def _tampered(where: str, expected: str, found: str) -> UnbakeError:
    return UnbakeError(
        where,
        expected=expected,
        found=found,
        advice="The patched file was changed after it was baked: go back to the base, or to the file as baked.",
    )


def _remove_monitors(model: ir.Model, record: PatchRecord) -> None:
    kept = [output for output in model.graph.outputs if output.name not in record.monitors]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)


def _hand_back_values(model: ir.Model, record: PatchRecord) -> None:
    """The last replacement first: two of one tensor stand in each other's place."""
    for node in reversed([node for node in model.graph if REPLACES_KEY in node.metadata_props]):
        hand_back(node)


def _remove_nodes(model: ir.Model, record: PatchRecord) -> None:
    inner = [
        node for node in model.graph.all_nodes() if node.graph is not model.graph and SITE_KEY in node.metadata_props
    ]
    for node in inner:  # let go of what our branches captured, or their nodes would stay users of the base's values
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    model.graph.remove([node for node in model.graph if SITE_KEY in node.metadata_props], safe=True)


def _remove_weights(model: ir.Model, record: PatchRecord) -> None:
    for name in [name for name in model.graph.initializers if name.startswith(PREFIX)]:
        model.graph.initializers.pop(name)


def _remove_metadata(model: ir.Model, record: PatchRecord) -> None:
    for key in [key for key in model.metadata_props if key.startswith(ENTRY)]:
        del model.metadata_props[key]


_STEPS = (_remove_monitors, _hand_back_values, _remove_nodes, _remove_weights, _remove_metadata)
