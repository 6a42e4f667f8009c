"""Take a patch out of a model again. What remains is the base, and its fingerprint proves it."""

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.deferral import recall
from atpatch_onnx.baking.emission import forget_the_map
from atpatch_onnx.baking.metadata import PatchRecord, read_record
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.names import DOMAIN, ENTRY, OUTPUTS_KEY, PREFIX, SITE_KEY, base_name, own_name


def unbake(model: ir.Model) -> ir.Model:
    """A copy of a patched model without the patch: equal to the base, node for node and weight for weight.

    Raises:
        UnbakeError: The model is not patched, or what remains is not the base that it names.
    """
    record = read_record(model)
    missing = graphs.undefined_value(model)
    if missing is not None:
        raise _tampered("the patched model", "a complete graph", f"the value {missing!r} used before it is there")
    base = graphs.copy(model)
    try:
        for step in _STEPS:
            step(base, record)
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


def _recall_maps(model: ir.Model, record: PatchRecord) -> None:
    recall(model)


def _remove_monitors(model: ir.Model, record: PatchRecord) -> None:
    kept = [output for output in model.graph.outputs if not (output.name or "").startswith(PREFIX)]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)


def _restore_outputs(model: ir.Model, record: PatchRecord) -> None:
    """Give every site's own output its name and its uses back."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    for site, name in record.outputs.items():
        own, corrected = values.get(base_name(site)), values.get(name)
        if own is None or corrected is None:
            raise _tampered(f"site {site}", f"the values {PREFIX}{site}/base and {name}", "one of them missing")
        ir.convenience.replace_all_uses_with(corrected, own, replace_graph_outputs=True)
        corrected.name = own_name(site, "corrected")
        own.name = name


def _restore_fused_nodes(model: ir.Model, record: PatchRecord) -> None:
    """A fused node gives back the outputs it was asked for."""
    asked = [node for node in model.graph if OUTPUTS_KEY in node.metadata_props]
    for node in asked:
        if len(node.outputs) > 3 and (node.outputs[3].name or "").startswith(PREFIX):
            forget_the_map(node)


def _remove_nodes(model: ir.Model, record: PatchRecord) -> None:
    ours = [node for node in model.graph if SITE_KEY in node.metadata_props]
    inner = [
        node for node in model.graph.all_nodes() if node.graph is not model.graph and SITE_KEY in node.metadata_props
    ]
    for node in inner:  # let go of what our branches captured, or their nodes would stay users of the base's values
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    model.graph.remove(ours, safe=True)
    for node in model.graph:
        count = node.metadata_props.pop(OUTPUTS_KEY, None)
        if count is not None:
            if not 0 < int(count) <= len(node.outputs):
                raise ValueError(f"the node {node.name!r} never had {count} outputs")
            node.resize_outputs(int(count))


def _remove_weights(model: ir.Model, record: PatchRecord) -> None:
    for name in [name for name in model.graph.initializers if name.startswith(PREFIX)]:
        model.graph.initializers.pop(name)


def _remove_functions(model: ir.Model, record: PatchRecord) -> None:
    for identifier in [identifier for identifier in model.functions if identifier[0] == DOMAIN]:
        del model.functions[identifier]
    model.graph.opset_imports.pop(DOMAIN, None)


def _remove_metadata(model: ir.Model, record: PatchRecord) -> None:
    for key in [key for key in model.metadata_props if key.startswith(ENTRY)]:
        del model.metadata_props[key]


_STEPS = (
    _recall_maps,
    _remove_monitors,
    _restore_outputs,
    _restore_fused_nodes,
    _remove_nodes,
    _remove_weights,
    _remove_functions,
    _remove_metadata,
)
