"""One trial of shape inference with numbers in place of symbols, node by node, with the shape arithmetic computed."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

Sizes = tuple[int | None, ...]

_DATA = 1024
"""Arrays of up to this many elements are computed; shapes, axes, starts and ends are far smaller."""


@dataclass(frozen=True)
class Trial:
    """What came out: shapes by value name, and the pairs of sizes that met and did not fit."""

    shapes: Mapping[str, Sizes]
    conflicts: tuple[tuple[int, int], ...]


def run(proto: onnx.ModelProto, sizes: Mapping[str, int]) -> Trial:
    """Infer the shapes of the main graph with `sizes` for the symbols of its inputs.

    A node that cannot be inferred keeps the shape that the model declares, if that is static; values that depend on
    the data of the inputs stay unknown.
    """
    trial = _Running(proto, sizes)
    trial.walk(proto.graph.node)
    shapes = {name: shape for name, kind in trial.types.items() if (shape := _sizes(kind)) is not None}
    return Trial(shapes, tuple(trial.conflicts))


@dataclass
class _Running:
    """The state of one trial while it walks along the nodes; it lives no longer than `run`."""

    proto: onnx.ModelProto
    sizes: Mapping[str, int]
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    data: dict[str, np.ndarray] = field(default_factory=dict)
    conflicts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._opset = next((entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
        graph = self.proto.graph
        self._declared = {
            info.name: kind
            for info in (*graph.input, *graph.value_info, *graph.output)
            if (kind := _numbered(info.type, self.sizes)) is not None
        }
        self.types.update({info.name: self._declared[info.name] for info in graph.input if info.name in self._declared})
        self._add_weights(graph)

    def _add_weights(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if tensor.data_location != onnx.TensorProto.EXTERNAL and np.prod(tensor.dims, dtype=np.int64) <= _DATA:
                self.data[tensor.name] = onnx.numpy_helper.to_array(tensor)

    def walk(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Infer and compute each node; of an If whose condition is known, the branch that is taken."""
        for node in nodes:
            branch = self._taken_branch(node)
            if branch is not None:
                self._add_weights(branch)
                self.walk(branch.node)
                for name, inner in zip(node.output, branch.output, strict=True):
                    self.types.update({name: self.types[inner.name]} if inner.name in self.types else {})
                    self.data.update({name: self.data[inner.name]} if inner.name in self.data else {})
                continue
            try:
                self.types.update(self._inferred(node))
            except Exception:  # onnx raises a dozen types for nodes that it cannot infer; their shapes stay unknown
                self._note_conflict(node)
            for name in node.output:
                if name not in self.types and name in self._declared:
                    self.types[name] = self._declared[name]
            self._compute(node)

    def _taken_branch(self, node: onnx.NodeProto) -> onnx.GraphProto | None:
        if node.op_type != "If" or node.input[0] not in self.data:
            return None
        wanted = "then_branch" if bool(self.data[node.input[0]].reshape(-1)[0]) else "else_branch"
        branch: onnx.GraphProto = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
        return branch

    def _inferred(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        if node.domain not in ("", "ai.onnx"):
            return {}
        names = [name for name in node.input if name]
        found: Mapping[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, self._opset, ""),
            node,
            {name: self.types[name] for name in names},
            {name: onnx.numpy_helper.from_array(self.data[name]) for name in names if name in self.data},
            opset_imports=list(self.proto.opset_import),
        )
        return found

    def _shape(self, name: str) -> Sizes | None:
        return _sizes(self.types[name]) if name in self.types else None

    def _compute(self, node: onnx.NodeProto) -> None:
        """Add the node's results to `data` if they are small and known."""
        if not all(_is_small(self._shape(name)) for name in node.output if name):
            return
        names = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size"):
            shape = self._shape(names[0])
            if shape is None or None in shape:
                return
            feeds = {names[0]: np.broadcast_to(np.float32(0), shape)}  # type: ignore[arg-type]  # only its shape counts
        elif not all(name in self.data for name in names) or node.op_type.startswith("Random"):
            return
        else:
            feeds = {name: self.data[name] for name in names}
        try:
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(node).run(None, feeds)
        except Exception:  # an operator that onnx's reference does not know: its result stays unknown
            return
        self.data.update({name: np.asarray(result) for name, result in zip(node.output, results, strict=True) if name})

    def _note_conflict(self, node: onnx.NodeProto) -> None:
        """Note the pairs of sizes, aligned from the last axis, that the node's inputs disagree on."""
        if node.op_type == "Reshape":
            return
        shapes = [shape for name in node.input if (shape := self._shape(name)) is not None]
        if node.op_type == "Expand" and node.input[1] in self.data:
            shapes[1:] = [tuple(self.data[node.input[1]].tolist())]
        for one, other in itertools.combinations(shapes, 2):
            for a, b in zip(reversed(one), reversed(other), strict=False):
                if a is not None and b is not None and a != b and 1 not in (a, b):
                    self.conflicts.append((a, b))


def _is_small(shape: Sizes | None) -> bool:
    return shape is not None and None not in shape and int(np.prod(shape, dtype=np.int64)) <= _DATA  # type: ignore[arg-type]


def _numbered(kind: onnx.TypeProto, sizes: Mapping[str, int]) -> onnx.TypeProto | None:
    """The declared type with numbers for symbols; None where it is no tensor or a size has no number."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    shape: list[int] = []
    for dim in kind.tensor_type.shape.dim:
        number = dim.dim_value if dim.HasField("dim_value") else sizes.get(dim.dim_param, _digits(dim.dim_param))
        if number is None:
            return None
        shape.append(number)
    return onnx.helper.make_tensor_type_proto(kind.tensor_type.elem_type, shape)


def _digits(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _sizes(kind: onnx.TypeProto) -> Sizes | None:
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim)
