"""The base, given the keys and values that a patched model goes on with: what its outputs must then be.

Cut open as protobuf, so that nothing of the package is used to make what the package is held against.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from models import run, with_outputs
from onnx import helper

from atpatch_onnx import graph
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.graph.names import REPLACES_KEY
from atpatch_onnx.matching import find_sites


def handed_over(patched: ir.Model) -> dict[str, str]:
    """The tensor that stands in for each tensor of the base, by the base's name; the last one where sites share it."""
    names: dict[str, str] = {}
    found = {}
    for node in patched.graph:
        if REPLACES_KEY in node.metadata_props:
            name, result = node.metadata_props[REPLACES_KEY], str(node.outputs[0].name)
            names[result] = names.get(name, name)
            found[names[result]] = result
    return found


def driven(
    base: ir.Model, patched: ir.Model, feed: Mapping[str, np.ndarray], *, optimize: bool = False
) -> dict[str, np.ndarray]:
    """The base's outputs, given every tensor that the patched model replaces as the patched model computes it."""
    names = handed_over(patched)
    (dtype,) = {site.dtype for site in find_sites(base)}
    seen = run(with_outputs(patched, list(names.values()), dtype), feed, optimize=optimize)
    given = {name: seen[result] for name, result in names.items()}
    readers = {
        place.value: place.reader
        for site in find_sites(base)
        for place in (site.key, site.value)
        if site.name in {one.site for one in read_record(patched).sites if one.redistributes}
    }
    proto = onnx.load_from_string(graph.to_bytes(base))
    for name, array in given.items():
        _cut(proto, name, array, readers[name])
    fed = {f"{name}/given": array for name, array in given.items()}
    return run(proto, {**feed, **fed}, optimize=optimize)


def _cut(proto: onnx.ModelProto, name: str, array: np.ndarray, reader: str | None) -> None:
    """Let the base's nodes read an input in place of a tensor; all of them, or the one that computes `reader`."""
    for node in _nodes(proto.graph):
        if reader is None or reader in node.output:
            for index, read in enumerate(node.input):
                if read == name:
                    node.input[index] = f"{name}/given"
    if reader is None and name in {output.name for output in proto.graph.output}:
        for node in proto.graph.node:
            for index, written in enumerate(node.output):
                if written == name:
                    node.output[index] = f"{name}/base"
        proto.graph.node.append(helper.make_node("Identity", [f"{name}/given"], [name], name=f"{name}/copy"))
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    proto.graph.input.append(helper.make_tensor_value_info(f"{name}/given", kind, array.shape))


def _nodes(made: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in made.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
