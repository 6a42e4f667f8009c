"""One trial of shape inference with numbers in place of symbols, node by node, with the shape arithmetic computed."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from atpatch_onnx.graph import protos
from atpatch_onnx.matching import tokenizers
from atpatch_onnx.matching.arithmetic import compute, flags_of

Sizes = tuple[int | None, ...]

_tensor = onnx.helper.make_tensor_type_proto

_DATA = 1024
"""Arrays of up to this many elements are computed; shapes, axes, starts and ends are far smaller."""

_BROADCASTING = {"Add", "Sub", "Mul", "Div", "Where", "And", "Or"}

_LIKE_FIRST = {
    "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "RotaryEmbedding",
    "GroupQueryAttention", "PagedAttention", "MultiHeadAttention", "Attention", "MoE", "QMoE",
}  # fmt: skip
"""Operators, most of them onnxruntime's own, whose result has the first operand's shape."""

_PACKING = {"MultiHeadAttention", "GroupQueryAttention", "PagedAttention"}
"""Operators that take Q, K and V in one tensor, too, which is wider than their result."""

_WITH_ACTIVATION = {"FusedGemm": "Gemm", "FusedConv": "Conv", "GemmFastGelu": "MatMul"}
"""onnxruntime's own operators that are one of onnx's, with an activation after it."""

_PACKED = {"MatMulNBits", "MatMulBnb4", "MatMulFpQ4"}
"""Products with weights of packed numbers, whose attribute `N` says how many features come out."""

_BLOCKED = "com.microsoft.nchwc"
"""The domain of onnxruntime's convolutions and pools in blocks of channels, written at its level `layout`."""


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
            self.types[tensor.name] = _tensor(tensor.data_type, tensor.dims)
            if protos.holds_content(tensor) and math.prod(tensor.dims) <= _DATA:
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
                self._assume(node)
            if node.op_type == "Reshape":
                self._note_resize(node)
            for name in node.output:
                if name not in self.types and name in self._declared:
                    self.types[name] = self._declared[name]
            self._compute(node)

    def _taken_branch(self, node: onnx.NodeProto) -> onnx.GraphProto | None:
        if node.op_type != "If" or node.domain not in ("", "ai.onnx") or node.input[0] not in self.data:
            return None
        if not self.data[node.input[0]].size:
            return None
        wanted = "then_branch" if bool(self.data[node.input[0]].reshape(-1)[0]) else "else_branch"
        branch: onnx.GraphProto = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
        return branch if len(branch.output) == len(node.output) else None

    def _inferred(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in ("", "ai.onnx.ml") or not onnx.defs.has(node.op_type, domain):
            return self._of_runtime(node)
        names = [name for name in node.input if name]
        found: Mapping[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, self._opset if domain == "" else self._opset_of(domain), domain),
            node,
            {name: self.types[name] for name in names},
            {name: onnx.numpy_helper.from_array(self.data[name]) for name in names if name in self.data},
            opset_imports=list(self.proto.opset_import),
        )
        return found

    def _opset_of(self, domain: str) -> int:
        return next((entry.version for entry in self.proto.opset_import if entry.domain == domain), 1)

    def _shape(self, name: str) -> Sizes | None:
        return _sizes(self.types[name]) if name in self.types else None

    def _compute(self, node: onnx.NodeProto) -> None:
        """Add the node's results to `data` if they are small and known."""
        if not all(_is_small(self._shape(name)) for name in node.output if name):
            return
        if any(attribute.HasField("g") for attribute in node.attribute):  # a loop may have any number of rounds
            return
        names = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size"):
            shape = self._shape(names[0])
            if shape is None or None in shape:
                return
            if node.op_type == "Shape" and not node.attribute:
                self.data[node.output[0]] = np.array(shape, np.int64)
                return
            feeds = {names[0]: np.broadcast_to(np.float32(0), shape)}  # type: ignore[arg-type]  # only its shape counts
        elif not all(name in self.data for name in names) or node.op_type.startswith("Random"):
            return
        else:
            feeds = {name: self.data[name] for name in names}
        results = compute(node, feeds)
        self.data.update({name: array for name, array in zip(node.output, results, strict=False) if name})

    def _of_runtime(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        """The result of an operator that onnx does not know; what is not known here either stays unknown."""
        if node.op_type in ("FusedMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
            return self._of_fused_matmul(node)
        if node.op_type in _WITH_ACTIVATION or (node.domain == _BLOCKED and onnx.defs.has(node.op_type)):
            return self._of_plain(node, _WITH_ACTIVATION.get(node.op_type, node.op_type))
        if node.op_type == "EmbedLayerNormalization":
            return self._of_embedding(node)
        if node.op_type == "GatherBlockQuantized":
            return self._of_packed_table(node)
        kind, shape = self.types.get(node.input[0]), self._shape(node.input[0])
        tokens = self.sizes.get(tokenizers.length_of(node.op_type, node.output[0]) or "")
        if tokens is not None and shape is not None:
            rows = tokenizers.results(node.op_type, shape, tokens, len(node.output))
            made = zip(node.output, rows, strict=False)
            return {name: _tensor(onnx.TensorProto.INT64, row) for name, row in made if name}
        if node.op_type in _PACKED and kind is not None and shape:
            return {node.output[0]: _tensor(kind.tensor_type.elem_type, (*shape[:-1], flags_of(node).get("N", 0)))}
        if node.domain == _BLOCKED:
            return self._of_reordered(node)
        if node.op_type not in _LIKE_FIRST or kind is None or shape is None:
            return {}
        if node.op_type == "Attention":  # its weights make Q, K and V at once
            weights = self._shape(node.input[1])
            if weights is None or weights[-1] is None:
                return {}
            shape = (*shape[:-1], weights[-1] // 3)
        if node.op_type in _PACKING and len(node.input) > 2 and not node.input[2]:
            return {}
        return {node.output[0]: _tensor(kind.tensor_type.elem_type, shape)}

    def _of_embedding(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        """Embedded tokens, the number of tokens that are no padding, and the embedded tokens before the norm."""
        ids, table = self._shape(node.input[0]), self._shape(node.input[2])
        if ids is None or table is None:
            return {}
        embedded = _tensor(self.types[node.input[2]].tensor_type.elem_type, (*ids, table[-1]))
        lengths = _tensor(onnx.TensorProto.INT32, ids[:1])
        return {name: kind for name, kind in zip(node.output, (embedded, lengths, embedded), strict=False) if name}

    def _of_packed_table(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        """Rows of a table whose numbers are packed: as many features as blocks have together."""
        indices, scales = self._shape(node.input[1]), self._shape(node.input[2])
        flags = flags_of(node)
        if indices is None or scales is None or scales[-1] is None or flags.get("gather_axis", 0) != 0:
            return {}
        kind = self.types[node.input[2]].tensor_type.elem_type
        features = scales[-1] * flags.get("block_size", 128)
        return {node.output[0]: _tensor(kind, (*indices, *scales[1:-1], features))}

    def _of_plain(self, node: onnx.NodeProto, op_type: str) -> Mapping[str, onnx.TypeProto]:
        """The result of one of onnx's operators under another name; what came on top of it is left out."""
        schema = onnx.defs.get_schema(op_type, self._opset, "")
        known = [attribute for attribute in node.attribute if attribute.name in schema.attributes]
        plain = onnx.NodeProto(op_type=op_type, input=node.input[:2], output=node.output[:1], attribute=known)
        return self._inferred(plain)

    def _of_reordered(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        """The begin or end of a stretch of blocked operators; channels that fill up the last block do not count."""
        shape = self._shape(node.input[0])
        flags = flags_of(node)
        if shape is None:
            return {}
        if node.op_type == "ReorderOutput":
            sizes, channels = shape[2:], flags.get("channels", shape[1])
            shape = (shape[0], *sizes, channels) if flags.get("channels_last") else (shape[0], channels, *sizes)
        elif flags.get("channels_last"):
            shape = (shape[0], shape[-1], *shape[1:-1])
        kind = self.types[node.input[0]].tensor_type.elem_type
        return {node.output[0]: _tensor(kind, shape)}

    def _of_fused_matmul(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        first, second = self._shape(node.input[0]), self._shape(node.input[1])
        if first is None or second is None or len(first) < 2 or len(second) < 2:
            return {}
        flags = flags_of(node)
        rows = first[-1 if flags.get("transA") else -2]
        columns = second[-2 if flags.get("transB") else -1]
        longer = first if len(first) >= len(second) else second
        quantized = node.op_type != "FusedMatMul"
        kind = onnx.TensorProto.FLOAT if quantized else self.types[node.input[0]].tensor_type.elem_type
        return {node.output[0]: _tensor(kind, (*longer[:-2], rows, columns))}

    def _assume(self, node: onnx.NodeProto) -> None:
        """Where sizes that broadcast do not fit, one is a wrong number for a mask: the largest operand's stay."""
        if node.op_type in _LIKE_FIRST and node.input[0] in self.types:  # a type that does not fit, as a float32 scale
            self.types[node.output[0]] = self.types[node.input[0]]
            return
        found = [(self._shape(name), name) for name in node.input]
        shapes = [(shape, name) for shape, name in found if shape is not None and None not in shape]
        if node.op_type in _BROADCASTING and len(shapes) > 1:
            largest = max(shapes, key=lambda found: _extent(found[0]))
            kind = self.types[node.input[1] if node.op_type == "Where" else largest[1]]
            self.types[node.output[0]] = _tensor(kind.tensor_type.elem_type, largest[0])

    def _note_conflict(self, node: onnx.NodeProto) -> None:
        """Note the pairs of sizes, aligned from the last axis, that the node's inputs disagree on."""
        if node.op_type == "Reshape":
            return
        if node.op_type == "Split":
            parts, shape = self.data.get(node.input[1]) if len(node.input) > 1 else None, self._shape(node.input[0])
            axis = flags_of(node).get("axis", 0)
            if parts is not None and shape and -len(shape) <= axis < len(shape):
                self.conflicts.append((shape[axis] or 0, int(parts.sum())))
            return
        shapes = [shape for name in node.input if (shape := self._shape(name)) is not None]
        wanted = self.data.get(node.input[1]) if node.op_type == "Expand" else None
        if wanted is not None and wanted.dtype.kind == "i":
            shapes[1:] = [tuple(wanted.reshape(-1).tolist())]
        for one, other in itertools.combinations(shapes, 2):
            for a, b in zip(reversed(one), reversed(other), strict=False):
                if a is not None and b is not None and a != b and 1 not in (a, b):
                    self.conflicts.append((a, b))

    def _note_resize(self, node: onnx.NodeProto) -> None:
        """Of a Reshape into another number of entries, each size with the one that would make the numbers equal."""
        shape, wanted = self._shape(node.input[0]), self.data.get(node.input[1])
        if shape is None or None in shape or wanted is None or not (wanted > 0).all():
            return
        have, asked = math.prod(shape), math.prod(wanted.reshape(-1).tolist())  # type: ignore[arg-type]
        if have not in (0, asked):
            self.conflicts += [(size, asked * size // have) for size in shape if size and asked * size % have == 0]


def _extent(shape: Sizes) -> tuple[int, int, int]:
    """How large a shape is: axes, those that are not broadcast (a mask is, over the heads), entries."""
    known = [size or 0 for size in shape]
    return len(known), sum(size > 1 for size in known), int(np.prod(known, dtype=np.int64))


def _is_small(shape: Sizes | None) -> bool:
    return shape is not None and None not in shape and math.prod(shape) <= _DATA  # type: ignore[arg-type]


_NUMBER = re.compile("[0-9]{1,9}")
"""A symbol that is a size: exporters write these, too."""


def _numbered(kind: onnx.TypeProto, sizes: Mapping[str, int]) -> onnx.TypeProto | None:
    """The declared type with numbers for symbols; None where it is no tensor or a size has no number."""
    if not _has_shape(kind):
        return None
    shape: list[int] = []
    for dim in kind.tensor_type.shape.dim:
        symbol = dim.dim_param
        number = sizes.get(symbol, int(symbol) if _NUMBER.fullmatch(symbol) else None)
        number = dim.dim_value if dim.HasField("dim_value") else number
        if number is None or number >= 2**63:  # what conflicts ask for need not be a size
            return None
        shape.append(number)
    return _tensor(kind.tensor_type.elem_type, shape)


def _has_shape(kind: onnx.TypeProto) -> bool:
    return bool(kind.HasField("tensor_type") and kind.tensor_type.HasField("shape"))


def _sizes(kind: onnx.TypeProto) -> Sizes | None:
    if not _has_shape(kind):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim)
