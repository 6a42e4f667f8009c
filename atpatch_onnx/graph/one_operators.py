"""Nodes are what ONNX's own schemas say of their operators: as many inputs and outputs, attributes of these types.

A node that is not, no runtime runs, and all that looks into graphs would have to ask for what should be there.
Operators that no schema is known of are left to those who know them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import onnx
import onnx_ir as ir

from atpatch_onnx.graph.one_calls import domain, is_reserved, nodes_within
from atpatch_onnx.graph.one_schema import Refusal

_LATEST = 2**31 - 1


_READ: Mapping[str, int] = {
    **dict.fromkeys(("perm", "axes", "strides"), onnx.AttributeProto.INTS),
    **dict.fromkeys(("axis", "to", "is_causal", "num_heads", "kv_num_heads", "q_num_heads"), onnx.AttributeProto.INT),
    **dict.fromkeys(("unidirectional", "do_rotary", "transA", "transB", "transBatchA"), onnx.AttributeProto.INT),
    **dict.fromkeys(("transBatchB", "local_window_size", "smooth_softmax"), onnx.AttributeProto.INT),
    **dict.fromkeys(("scale", "softcap", "alpha", "epsilon"), onnx.AttributeProto.FLOAT),
    **dict.fromkeys(("then_branch", "else_branch", "body"), onnx.AttributeProto.GRAPH),
    "equation": onnx.AttributeProto.STRING,
}
"""Attributes that have one type wherever they stand in operators without a schema, those of onnxruntime above all."""

_DATA_TYPES = ("to", "dtype")
_KNOWN = frozenset(int(kind) for kind in ir.DataType)


@dataclass(frozen=True)
class _Schema:
    inputs: tuple[int, int]
    """How many at least, and at most."""

    outputs: tuple[int, int]
    needed: tuple[int, ...]
    """Places of inputs that may not be left out."""

    attributes: Mapping[str, int]
    """Their types."""

    required: frozenset[str]


def check_operators(model: onnx.ModelProto, refusal: Refusal) -> None:
    """Refuse nodes that cannot be what their operators are.

    Raises:
        Exception: What `refusal` makes.
    """
    functions = {(domain(function.domain), function.name) for function in model.functions}
    parts: list[tuple[Iterable[onnx.NodeProto], Iterable[onnx.OperatorSetIdProto]]] = [
        (model.graph.node, model.opset_import),
        *((function.node, function.opset_import) for function in model.functions),
    ]
    for nodes, imports in parts:
        versions = {domain(entry.domain): entry.version for entry in imports}
        for name, version in versions.items():
            if not 1 <= version <= _LATEST:
                raise refusal("the opset imports", "versions from 1 up", f"version {version} of the domain {name!r}")
        for node in nodes_within(nodes):
            name = domain(node.domain)
            if (name, node.op_type) in functions:
                continue
            schema = _schema(node.op_type, name, versions[name]) if name in versions else None
            if schema is not None:
                _check(node, schema, refusal)
            elif is_reserved(name) or onnx.defs.has(node.op_type):
                _check_types(node, _READ, refusal)
            _check_values(node, refusal)


def _check_values(node: onnx.NodeProto, refusal: Refusal) -> None:
    """Attributes of which only some values mean anything."""
    where = f"node {node.name!r} ({node.op_type})"
    for attribute in node.attribute:
        if attribute.name in _DATA_TYPES and attribute.i and attribute.i not in _KNOWN:
            raise refusal(where, f"a type of elements as {attribute.name!r}", str(attribute.i))
        if attribute.name == "perm" and sorted(attribute.ints) != list(range(len(attribute.ints))):
            raise refusal(where, "each axis once in 'perm'", str(list(attribute.ints)))


@lru_cache(maxsize=4096)
def _schema(op_type: str, name: str, version: int) -> _Schema | None:
    try:
        found = onnx.defs.get_schema(op_type, version, name)
    except onnx.defs.SchemaError:
        return None
    return _Schema(
        (found.min_input, found.max_input),
        (found.min_output, found.max_output),
        tuple(
            place
            for place, one in enumerate(found.inputs)
            if one.option is onnx.defs.OpSchema.FormalParameterOption.Single
        ),
        {key: int(cast(Any, attribute.type).value) for key, attribute in found.attributes.items()},
        frozenset(key for key, attribute in found.attributes.items() if attribute.required),
    )


def _check(node: onnx.NodeProto, schema: _Schema, refusal: Refusal) -> None:
    where = f"node {node.name!r} ({node.op_type})"
    for what, names, (least, most) in (
        ("inputs", node.input, schema.inputs),
        ("outputs", node.output, schema.outputs),
    ):
        count = max((place for place, name in enumerate(names, 1) if name), default=0)
        if len(names) < least or count > most:
            raise refusal(where, f"{least} to {most} {what}", f"{count}")
    for place in schema.needed:
        if place < len(node.input) and not node.input[place]:
            raise refusal(where, f"an input {place}", "none")
    missing = sorted(schema.required - {attribute.name for attribute in node.attribute})
    if missing:
        raise refusal(where, f"the attribute {missing[0]!r}", "none")
    _check_types(node, schema.attributes, refusal)


def _check_types(node: onnx.NodeProto, types: Mapping[str, int], refusal: Refusal) -> None:
    for attribute in node.attribute:
        kind = types.get(attribute.name, attribute.type)
        if attribute.type != kind:
            where = f"the attribute {attribute.name!r} of node {node.name!r} ({node.op_type})"
            raise refusal(where, f"type {_named(kind)}", _named(attribute.type))
        if attribute.name in types and not _is_text(attribute.s):  # operators of others may hold bytes of any kind
            where = f"the attribute {attribute.name!r} of node {node.name!r} ({node.op_type})"
            raise refusal(where, "text", repr(attribute.s))


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _named(kind: int) -> str:
    return str(onnx.AttributeProto.AttributeType.Name(kind))
