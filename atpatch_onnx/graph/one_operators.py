"""Nodes are what ONNX's own schemas say of their operators: as many inputs and outputs, attributes of these types.

A node that is not, no runtime runs, and all that looks into graphs would have to ask for what should be there.
Operators that no schema is known of are left to those who know them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import onnx

from atpatch_onnx.graph.one_calls import domain, nodes_within
from atpatch_onnx.graph.one_schema import Refusal

_LATEST = 2**31 - 1


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
            if name in versions and (name, node.op_type) not in functions:
                schema = _schema(node.op_type, name, versions[name])
                if schema is not None:
                    _check(node, schema, refusal)


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
    types = {attribute.name: attribute.type for attribute in node.attribute}
    missing = sorted(schema.required - types.keys())
    if missing:
        raise refusal(where, f"the attribute {missing[0]!r}", "none")
    for key, kind in types.items():
        if schema.attributes.get(key, kind) != kind:
            wanted = onnx.AttributeProto.AttributeType.Name(schema.attributes[key])
            raise refusal(
                where, f"the attribute {key!r} of type {wanted}", onnx.AttributeProto.AttributeType.Name(kind)
            )
