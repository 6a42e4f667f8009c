"""What runtimes document of the operators that a patch is written with, and what of a file they do not.

Only the operators that patches are written with were looked up, with the types that they may have there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from jinja2 import Environment, StrictUndefined

from atpatch_onnx.baking.kernels import sizes_of
from atpatch_onnx.graph.names import SITE_KEY

PAGE = Path(__file__).parent / "documented.md.j2"

_ALL = frozenset({"BFLOAT16", "BOOL", "FLOAT", "FLOAT16", "INT64"})
_FLOATS = frozenset({"BFLOAT16", "FLOAT", "FLOAT16"})
_EXACT = _FLOATS - {"BFLOAT16"}
_BOOL = frozenset({"BOOL"})

VIEWS = dict.fromkeys(("Cast", "Reshape", "Squeeze", "Transpose", "Unsqueeze"), _ALL)
SIZES = dict.fromkeys(("Concat", "Gather", "Mul", "Shape", "Slice"), _ALL)


@dataclass(frozen=True)
class Listed:
    """The documented operators of one runtime."""

    target: str
    """The files that are for it."""

    runtime: str
    source: str
    types: dict[str, frozenset[str]]
    """Of the tensor that an operator works on, by operator."""


_CUDA = (
    VIEWS
    | SIZES
    | dict.fromkeys(("Add", "MatMul", "Max", "Relu", "Sub", "Where"), _FLOATS)
    | dict.fromkeys(("Greater", "ReduceMax"), _EXACT)
    | {"And": _BOOL}
)
_HALF = {name: types - {"BFLOAT16"} for name, types in _CUDA.items()}

LISTS = (
    Listed(
        "cuda",
        "onnxruntime, CUDA",
        "microsoft/onnxruntime, docs/OperatorKernels.md (Where takes bfloat16 from opset 16)",
        _CUDA,
    ),
    Listed("directml", "onnxruntime, DirectML", "microsoft/onnxruntime, docs/OperatorKernels.md", _HALF),
    Listed("tensorrt", "TensorRT", "onnx/onnx-tensorrt, docs/operators.md (TensorRT 8.5)", _HALF),
    Listed(
        "web",
        "onnxruntime-web, WebGPU",
        "microsoft/onnxruntime, js/web/docs/webgpu-operators.md",
        {name: types for name, types in _HALF.items() if name not in ("And", "Max")},
    ),
)


def section() -> str:
    """The part of `docs/evidence/runtimes.md` on runtimes that are not at hand."""
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    rows = [
        {
            "listed": listed,
            "missing": sorted(set(_CUDA) - set(listed.types)),
            "bfloat16": "BFLOAT16" in listed.types["Where"],
        }
        for listed in LISTS
    ]
    return environment.from_string(PAGE.read_text()).render(rows=rows, operators=sorted(_CUDA))


def unlisted(model: ir.Model, listed: Listed) -> tuple[str, ...]:
    """The operators of a patch that a runtime does not document, or not with the type that they have, sorted.

    Sizes are left out: they are known to the host.
    """
    types, sizes = _types(model), {node.name for node in sizes_of(model.graph)}
    found = set()
    for node in _ours(model):
        if node.name in sizes:
            continue
        of = [types[value.name] for value in _worked_on(node) if value.name in types]
        if node.op_type not in listed.types or not set(of) <= listed.types[node.op_type]:
            found.add(f"{node.op_type}({', '.join(dict.fromkeys(of)).lower()})")
    return tuple(sorted(found))


def sizes_at_run_time(model: ir.Model) -> tuple[str, ...]:
    """The nodes of a patch whose shape or axes are no weights: TensorRT wants them to be."""
    return tuple(
        str(node.name)
        for node in _ours(model)
        if node.op_type in ("Reshape", "ReduceMax", "Squeeze", "Unsqueeze")
        and any(value is not None and value.const_value is None for value in node.inputs[1:])
    )


def _ours(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph.all_nodes() if SITE_KEY in node.metadata_props)


def _worked_on(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs whose type decides which kernel runs: not a condition, a shape or axes."""
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == "Where":
        yield from inputs[1:]
    elif node.op_type in ("Reshape", "ReduceMax", "Slice", "Squeeze", "Unsqueeze"):
        yield inputs[0]
    else:
        yield from inputs


def _types(model: ir.Model) -> dict[str | None, str]:
    """Types of values by name, as far as onnx can tell."""
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    graph = proto.graph
    known = {one.name: one.type.tensor_type.elem_type for one in (*graph.value_info, *graph.input, *graph.output)}
    known |= {one.name: one.data_type for one in graph.initializer}
    return {name: onnx.TensorProto.DataType.Name(number) for name, number in known.items() if number}
