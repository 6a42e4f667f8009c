"""One reading of a model file: what two readers could understand differently is refused, with its place.

A patched file is proven by what this package reads of it, and served by what onnxruntime reads of it. Where a name is
given twice, onnx-ir keeps the last, onnxruntime the first; so a file could be shown to one and run by the other. Here
the file is looked at as protobuf holds it, before any reader has chosen.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import chain
from pathlib import Path

import onnx
from onnx import AttributeProto

from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph.kept_types import has_map
from atpatch_onnx.graph.one_calls import check_calls, domain, nodes_within
from atpatch_onnx.graph.one_content import check_content
from atpatch_onnx.graph.one_operators import check_operators
from atpatch_onnx.graph.one_schema import Refusal, check_schema
from atpatch_onnx.graph.protos import tensors

_CONTENT = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    AttributeProto.TYPE_PROTOS: "type_protos",
}
"""The field that holds an attribute of each type."""

_DEVICES = 11
"""The IR version that brought devices; writers of older ones leave them out."""

Scopes = tuple[Set[str], ...]
"""The names that a graph sees: those of each graph around it, outer ones first."""

_MESSAGES = ("t", "g", "sparse_tensor", "tp")
"""Fields that must be there: nothing stands for a tensor or a graph by default."""


def check_one_reading(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a file that readers may understand differently, or of which this package would lose a part.

    Raises:
        ModelFileError: What is ambiguous, and where.
    """

    def refusal(where: str, expected: str, found: str) -> ModelFileError:
        return ModelFileError(
            f"{path}: {where}" if where else str(path),
            expected=expected,
            found=found,
            advice="Others understand such a file differently, or not at all: do not run it; export the model again.",
        )

    check_schema(model, refusal)
    for tensor in tensors(model):
        check_content(tensor, refusal)
    check_calls(model, refusal)
    _Reading(path, refusal).model(model)
    check_operators(model, refusal)


class _Reading:
    """The names of a file, scope by scope."""

    def __init__(self, path: Path, refusal: Refusal) -> None:
        self._path = path
        self._refusal = refusal

    def model(self, model: onnx.ModelProto) -> None:
        if model.training_info:
            raise self._unsupported("training_info", "a model for inference", "how to train it", "Take that out")
        self._opsets(model.opset_import, "the model")
        self._entries(model.metadata_props, "the model")
        self._devices(model)
        for tensor in tensors(model):
            self._entries(tensor.metadata_props, f"the tensor {tensor.name!r}")
        self.graph(model.graph, ())
        for function in model.functions:
            self.function(function)

    def function(self, function: onnx.FunctionProto) -> None:
        where = f"the function {function.name!r}"
        self._opsets(function.opset_import, where)
        self._entries(function.metadata_props, where)
        self._once(function.input, where, "input")
        self._once(function.output, where, "output")
        defaults = [attribute.name for attribute in function.attribute_proto]
        self._once([*function.attribute, *defaults], where, "attribute")
        for attribute in function.attribute_proto:
            self.attribute(attribute, where, (), False)
            if any(tensor.external_data for tensor in (attribute.t, *attribute.tensors)):
                found = "a default value in external data"
                raise self._unsupported(where, "default values in the file itself", found, "Take them in")
        self._types(function.value_info, where)
        self._supported(function.value_info, where)
        known = self.nodes(function.node, set(function.input), (), where, True)
        self._there(function.output, known, where)

    def graph(self, graph: onnx.GraphProto, outer: Scopes, within: bool = False) -> None:
        """Check a graph; `outer` are the names that it sees around it, `within` whether a function holds it."""
        where = f"the graph {graph.name!r}"
        if graph.sparse_initializer:
            found = "sparse initializers"
            raise self._unsupported(where, "dense initializers", found, "Store them as dense ones")
        inputs = [value.name for value in graph.input]
        weights = [tensor.name for tensor in graph.initializer]
        self._once(inputs, where, "input")
        self._once(weights, where, "initializer")
        if not all(chain(inputs, weights)):
            raise self._refusal(where, "a name for each input and initializer", "one without")
        self._entries(graph.metadata_props, where)
        self._types([*graph.input, *graph.output, *graph.value_info], where)
        main = not outer and not within
        self._supported([*graph.input, *graph.value_info, *([] if main else graph.output)], where)
        self._same_types(graph, where)
        self._annotations(graph, where)
        known = self.nodes(graph.node, {*inputs, *weights}, outer, where, within)
        self._there([value.name for value in graph.output], known, where)  # one around it, no branch may return

    def nodes(
        self, nodes: Iterable[onnx.NodeProto], known: set[str], outer: Scopes, where: str, within: bool
    ) -> Set[str]:
        """Each value is computed once, before it is used, and hides none around its graph; answers those of nodes."""
        for name in (name for name in known if _seen(name, outer)):
            raise self._refusal(where, "names that the graphs around it do not have", f"{name!r}, which one has")
        scopes = (*outer, known)
        for node in nodes:
            place = f"node {node.name!r} ({node.op_type}) of {where}"
            if not node.op_type:
                raise self._refusal(place, "an operator", "none")
            for name in node.input:
                if name and not _seen(name, scopes):
                    raise self._missing(name, place)
            self._once((attribute.name for attribute in node.attribute), place, "attribute")
            self._entries(node.metadata_props, place)
            for attribute in node.attribute:
                self.attribute(attribute, place, scopes, within)
            for output in node.output:
                if output and _seen(output, scopes):
                    raise self._refusal(place, "each value once", f"the value {output!r}, which is there already")
                known.add(output)
        return known

    def attribute(self, attribute: onnx.AttributeProto, place: str, known: Scopes, within: bool) -> None:
        where = f"the attribute {attribute.name!r} of {place}"
        held = [name for name in _CONTENT.values() if _holds(attribute, name)]
        if attribute.type not in _CONTENT:
            raise self._refusal(where, "a type", f"the attribute {attribute.name!r} without a type")
        wanted = _CONTENT[attribute.type]
        if attribute.ref_attr_name:
            if wanted in ("g", "graphs"):
                found = "a reference to a graph of its function"
                raise self._unsupported(where, "a graph in the node itself", found, "Put it into the node")
            if not within or held:
                found = ", ".join(held) or "no function around it"
                raise self._refusal(where, "a reference to an attribute of its function, and no more", found)
            return
        if [name for name in held if name != wanted] or (wanted in _MESSAGES and not held):
            raise self._refusal(where, f"content in {wanted} alone", ", ".join(held) or "none")
        if wanted in ("sparse_tensor", "sparse_tensors"):
            raise self._unsupported(where, "dense tensors", "sparse ones", "Store them as dense ones")
        for graph in _graphs(attribute):
            self.graph(graph, known, within)

    def _types(self, values: Iterable[onnx.ValueInfoProto], where: str) -> None:
        """What is said of a value more than once must not contradict itself."""
        said: dict[str, onnx.TypeProto] = {}
        for value in values:
            self._entries(value.metadata_props, f"the value {value.name!r}")
            for kind in _nested(value.type):
                if kind.tensor_type.HasField("shape") and not kind.tensor_type.HasField("elem_type"):
                    raise self._refusal(f"the value {value.name!r} of {where}", "a type", "a shape without one")
                if kind.HasField("opaque_type"):
                    what = f"the value {value.name!r} of {where}"
                    raise self._unsupported(what, "tensors, sequences and maps", "an opaque type", "Take it out")
            if value.name in said and _contradict(said[value.name], value.type):
                raise self._refusal(where, f"one type of the value {value.name!r}", "two that contradict each other")
            said.setdefault(value.name, value.type)

    def _supported(self, values: Iterable[onnx.ValueInfoProto], where: str) -> None:
        """A map is returned, and no more: an output of the model."""
        for value in values:
            if has_map(value.type):
                what = f"the value {value.name!r} of {where}"
                raise self._unsupported(
                    what, "tensors and sequences of them", "a map", "Take off what takes or makes it"
                )

    def _same_types(self, graph: onnx.GraphProto, where: str) -> None:
        """An initializer has the type that is declared; its shape is not compared: exporters and onnxruntime differ."""
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in chain(graph.input, graph.value_info):
            declared = value.type.tensor_type.elem_type
            if declared and kinds.get(value.name, declared) != declared:
                found = f"type {kinds[value.name]} in the initializer and {declared} in its declaration"
                raise self._refusal(where, f"one type of {value.name!r}", found)

    def _annotations(self, graph: onnx.GraphProto, where: str) -> None:
        self._once((entry.tensor_name for entry in graph.quantization_annotation), where, "quantization annotation of")
        for entry in graph.quantization_annotation:
            self._entries(entry.quant_parameter_tensor_names, f"the annotation of {entry.tensor_name!r}")

    def _opsets(self, imports: Iterable[onnx.OperatorSetIdProto], where: str) -> None:
        versions: dict[str, int] = {}
        for entry in imports:
            name = domain(entry.domain)
            if versions.setdefault(name, entry.version) != entry.version:
                found = f"versions {versions[name]} and {entry.version} of the domain {entry.domain!r}"
                raise self._refusal(where, "one version of each opset", found)

    def _devices(self, model: onnx.ModelProto) -> None:
        """What nodes say of devices must be what the model has, of a version that has devices at all."""
        self._once((entry.name for entry in model.configuration), "the model", "device configuration")
        known = {entry.name for entry in model.configuration} if model.ir_version >= _DEVICES else set()
        if model.configuration and not known:
            raise self._refusal("the model", f"devices from IR version {_DEVICES} on", f"IR version {model.ir_version}")
        for node in nodes_within(chain(model.graph.node, *(function.node for function in model.functions))):
            for entry in node.device_configurations:
                if entry.configuration_id not in known:
                    found = repr(entry.configuration_id)
                    raise self._refusal(f"node {node.name!r}", "a device configuration of the model", found)

    def _entries(self, entries: Iterable[onnx.StringStringEntryProto], where: str) -> None:
        self._once((entry.key for entry in entries), where, "metadata entry")

    def _once(self, names: Iterable[str], where: str, what: str) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise self._refusal(where, f"each {what} once", f"the {what} {name!r} twice")
            seen.add(name)

    def _there(self, names: Iterable[str], known: Set[str], where: str) -> None:
        for name in names:
            if not name or name not in known:
                raise self._missing(name, f"the outputs of {where}")

    def _missing(self, name: str, place: str) -> Exception:
        return self._refusal(place, "values that are there", f"a graph that uses the value {name!r} before it is there")

    def _unsupported(self, where: str, expected: str, found: str, advice: str) -> ModelFileError:
        """Of what is sound, but would be lost when this package writes the model again."""
        return ModelFileError(
            f"{self._path}: {where}",
            expected=expected,
            found=f"{found}, which this package does not handle",
            advice=f"{advice}, and export the model again.",
        )


def _seen(name: str, scopes: Scopes) -> bool:
    return any(name in scope for scope in scopes)


def _graphs(attribute: onnx.AttributeProto) -> Sequence[onnx.GraphProto]:
    return (attribute.g,) if attribute.HasField("g") else attribute.graphs


def _holds(attribute: onnx.AttributeProto, name: str) -> bool:
    single = name in _MESSAGES or len(name) == 1
    return attribute.HasField(name) if single else bool(len(getattr(attribute, name)))


def _nested(kind: onnx.TypeProto) -> Iterator[onnx.TypeProto]:
    """A type and those of the elements of sequences and optionals in it."""
    yield kind
    for field in ("sequence_type", "optional_type"):
        if kind.HasField(field):
            yield from _nested(getattr(kind, field).elem_type)


def _contradict(one: onnx.TypeProto, other: onnx.TypeProto) -> bool:
    """Whether two types of a value exclude each other; one may say less than the other."""
    kinds = {kind.WhichOneof("value") for kind in (one, other)} - {None}
    if len(kinds) > 1:
        return True
    if "tensor_type" not in kinds:
        return bool(kinds) and one != other
    first, second = one.tensor_type, other.tensor_type
    if first.elem_type and second.elem_type and first.elem_type != second.elem_type:
        return True
    if not (first.HasField("shape") and second.HasField("shape")):
        return False
    if len(first.shape.dim) != len(second.shape.dim):
        return True
    pairs = zip(first.shape.dim, second.shape.dim, strict=True)
    return any(a.HasField("dim_value") and b.HasField("dim_value") and a.dim_value != b.dim_value for a, b in pairs)
