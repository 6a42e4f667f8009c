"""Read and write models, fingerprint them, know their shapes.

Weights in external data files are never read to do so: a model of tens of gigabytes is opened in the time its graph
takes. A model file is untrusted input: external data must lie inside the model's folder, symlinks resolved.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from atpatch_onnx.errors import ModelFileError

Model = ir.Model
"""A model in memory, as onnx-ir holds it."""

ModelOrPath = ir.Model | str | os.PathLike[str]
"""A model in memory, or where it lies."""

PREFIX = "atpatch/"
"""Every node, value and initializer that this package adds is named under this prefix."""

PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes of in-memory weights above which they are written to an external data file (protobuf holds at most 2 GiB)."""

FULL_FINGERPRINT_LIMIT = 2**30
"""Bytes of weights up to which a fingerprint covers every byte."""

_SOURCE_LINES = "pkg.torch.onnx.stack_trace"
"""Node metadata in which torch's exporter notes the source lines behind a node, with the paths of the machine."""

_SAMPLE_BLOCKS = 16
_SAMPLE_BYTES = 4096

_DATA_TYPES = {int(kind) for kind in ir.DataType if kind is not ir.DataType.UNDEFINED}

_SHAPE_BYTES = 1024
"""Weights up to this size take part in shape inference: targets of Reshape, axes, starts and ends."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an `.onnx` file. Weights in external data stay on disk.

    Raises:
        ModelFileError: The file is missing, truncated or no ONNX model, or its external data is missing, shorter than
            the model says, or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(
            str(path),
            expected="an ONNX file",
            found="a folder" if path.is_dir() else "nothing there",
            advice="Check the path.",
        )
    try:
        proto = onnx.load(str(path), load_external_data=False, format="protobuf")
    except Exception as error:  # protobuf's DecodeError has no public home across its backends
        raise _not_onnx(path, f"bytes that do not parse ({type(error).__name__})") from error
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise _not_onnx(path, "bytes without a graph, an IR version or an opset")
    _check_tensors(proto, path)
    _check_external_data(proto, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise _not_onnx(path, f"a graph that is not well formed ({error})") from error
    untyped = [attribute for attribute in _attributes(model) if attribute.type is ir.AttributeType.UNDEFINED]
    if untyped:
        raise _not_onnx(path, f"the attribute {untyped[0].name!r} without a type")
    broken = next((text for text in _texts(model) if text is not None and not isinstance(text, str)), None)
    if broken is not None:
        raise _not_onnx(path, f"the name {broken!r}, which is no text")
    missing = undefined_value(model)
    if missing is not None:
        raise _not_onnx(path, f"a graph that uses the value {missing!r} before it is there")
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    return model


def as_model(model: ModelOrPath) -> ir.Model:
    """A model as it is, or read from its path."""
    return model if isinstance(model, ir.Model) else load(model)


def _not_onnx(path: Path, found: str) -> ModelFileError:
    return ModelFileError(
        str(path),
        expected="a complete ONNX model",
        found=found,
        advice="Export the model again, or copy the file again if it was cut short.",
    )


def _check_tensors(proto: onnx.ModelProto, path: Path) -> None:
    """Tensors must have a type, and as many bytes as their shape says."""
    for tensor in _tensors(proto):
        if tensor.data_type not in _DATA_TYPES:
            raise _not_onnx(path, f"the tensor {tensor.name!r} of the unknown type {tensor.data_type}")
        if tensor.HasField("raw_data") and len(tensor.raw_data) != _tensor_bytes(tensor):
            raise _not_onnx(path, f"the tensor {tensor.name!r} with {len(tensor.raw_data)} bytes for {tensor.dims}")


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """External data must lie inside the model's folder (symlinks resolved) and be as long as the model says."""
    folder = path.parent.resolve()
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{path}: external data of {tensor.name!r}"
        target = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
            raise ModelFileError(
                where,
                expected=f"a file inside the model's folder {folder}",
                found=f"{location!r}, which is {target}",
                advice="Do not use this file unless you trust who made it; move the data beside the model otherwise.",
            )
        if not target.is_file():
            raise ModelFileError(
                where,
                expected=f"the file {location!r} beside the model",
                found="nothing there",
                advice="Copy the external data file together with the model.",
            )
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries["length"]) if "length" in entries else _tensor_bytes(tensor)
        except ValueError:
            offset, length = -1, -1
        if offset < 0 or length < 0 or offset + length > target.stat().st_size or length < _tensor_bytes(tensor):
            raise ModelFileError(
                where,
                expected=f"{_tensor_bytes(tensor)} bytes at offset {offset} of {location!r}",
                found=f"a file of {target.stat().st_size} bytes and a stated length of {length}",
                advice="The data file was cut short or belongs to another model: copy it again.",
            )


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes a tensor's elements take; 4-bit types are packed two to a byte."""
    count = int(np.prod([max(int(size), 0) for size in tensor.dims], dtype=np.int64)) if tensor.dims else 1
    return (count * ir.DataType(tensor.data_type).bitwidth + 7) // 8


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a file: weights and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _attribute_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from _graph_tensors(subgraph)


# Saving


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a model; the file appears whole or not at all.

    External data that already lies beside `path` is referenced; data that lies elsewhere is copied there. In-memory
    weights of more than 2 GiB go to `<name>.data`.

    Raises:
        ModelFileError: The target cannot be written, or another file is in the way of the external data.
    """
    path = Path(path)
    try:
        folder = path.parent.resolve(strict=True)
        with tempfile.TemporaryDirectory(prefix=".atpatch-", dir=folder) as staging:
            staged = Path(staging) / path.name
            if _weight_bytes(model, external=False) > PROTOBUF_LIMIT:
                ir.save(model, staged, external_data=f"{path.name}.data")
            else:
                _carry_external_data(model, folder)
                staged.write_bytes(_serialized(model))
            for file in sorted(Path(staging).iterdir(), reverse=True):  # the data before the model that names it
                os.replace(file, folder / file.name)
    except OSError as error:
        raise ModelFileError(
            str(path),
            expected="a place that can be written to",
            found=str(error),
            advice="Choose another path, or make room.",
        ) from error


def _carry_external_data(model: ir.Model, folder: Path) -> None:
    for source, location in sorted(_external_files(model)):
        target = folder / location
        if not target.resolve().is_relative_to(folder):
            raise ModelFileError(
                str(target),
                expected=f"external data inside {folder}",
                found=str(target.resolve()),
                advice="Save to a folder without that symlink.",
            )
        if target.exists():
            if target.samefile(source) or _same_content(target, source):
                continue
            raise ModelFileError(
                str(target),
                expected="no other file where the model's external data has to go",
                found=f"a file of {target.stat().st_size} bytes",
                advice="Save to an empty folder, or beside the base model.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _same_content(first: Path, second: Path) -> bool:
    if first.stat().st_size != second.stat().st_size:
        return False
    with first.open("rb") as one, second.open("rb") as other:
        return hashlib.file_digest(one, "sha256").digest() == hashlib.file_digest(other, "sha256").digest()


def _serialized(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def to_bytes(model: ir.Model) -> bytes:
    """The model as the bytes of an `.onnx` file; external data stays referenced."""
    return _serialized(model)


def copy(model: ir.Model) -> ir.Model:
    """An independent copy whose weights are shared, not copied."""
    return model.clone()


def external_folder(model: ir.Model) -> Path | None:
    """The folder that the model's external data is relative to; None where it has none."""
    for tensor in weights(model).values():
        if isinstance(tensor, ir.ExternalTensor):
            return Path(tensor.base_dir)
    return None


def _external_files(model: ir.Model) -> set[tuple[Path, str]]:
    return {
        (Path(tensor.path).resolve(), str(tensor.location))
        for tensor in weights(model).values()
        if isinstance(tensor, ir.ExternalTensor)
    }


def weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The initializers of the main graph and its subgraphs by name."""
    found: dict[str, ir.TensorProtocol] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                found[name] = value.const_value
    return found


def _weight_bytes(model: ir.Model, *, external: bool = True) -> int:
    return sum(
        tensor.nbytes for tensor in weights(model).values() if external or not isinstance(tensor, ir.ExternalTensor)
    )


# Fingerprints


def fingerprint(model: ir.Model) -> str:
    """A digest of the model's content: every node, attribute, value, weight and metadata entry, in order.

    Two models have the same fingerprint exactly when they are equal node for node and weight for weight, wherever their
    weights are stored. Up to 1 GiB of weights every byte counts (`sha256:...`). Above that only shape, type and 16
    evenly spaced blocks of 4 KiB of each larger weight do, and the fingerprint says so (`sha256-sampled:...`).

    One metadata entry does not count: the source lines that torch's exporter notes at each node
    (`pkg.torch.onnx.stack_trace`). They hold the paths of installed packages, in which alone two machines' exports of
    one model differ.
    """
    sampled = _weight_bytes(model) > FULL_FINGERPRINT_LIMIT
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

    add(str(model.ir_version), repr(sorted(model.opset_imports.items())), repr(sorted(model.metadata_props.items())))
    add(str(model.producer_name), str(model.producer_version), str(model.domain), str(model.model_version))
    for identifier, function in sorted(model.functions.items()):
        function_proto = ir.to_proto(function)
        _drop_source_lines(function_proto.node)
        add(repr(identifier), function_proto.SerializeToString(deterministic=True))
    graph = model.graph
    add(str(graph.name), repr(sorted(graph.metadata_props.items())))
    for group in (graph.inputs, graph.outputs, graph.initializers.values()):
        add("group")
        for value in group:
            add(_value_bytes(value))
    for node in graph:
        proto = ir.to_proto(node)
        _drop_source_lines([proto])
        add(proto.SerializeToString(deterministic=True))
        for value in node.outputs:
            add(_value_bytes(value))
    for name, tensor in weights(model).items():
        add(name, str(tensor.dtype), repr(tuple(tensor.shape)), _tensor_digest(tensor, sampled))
    return f"sha256{'-sampled' if sampled else ''}:{digest.hexdigest()}"


def _drop_source_lines(nodes: Iterable[onnx.NodeProto]) -> None:
    """Remove the entry `pkg.torch.onnx.stack_trace` from nodes and the nodes of their subgraphs, in place."""
    for node in nodes:
        kept = [entry for entry in node.metadata_props if entry.key != _SOURCE_LINES]
        if len(kept) < len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                _drop_source_lines(subgraph.node)


def _value_bytes(value: ir.Value) -> bytes:
    return bytes(ir.serde.serialize_value(value).SerializeToString(deterministic=True))


def _tensor_digest(tensor: ir.TensorProtocol, sampled: bool) -> bytes:
    if isinstance(tensor, ir.ExternalTensor):
        with Path(tensor.path).open("rb") as file:
            start = tensor.offset or 0
            if not sampled or tensor.nbytes <= _SAMPLE_BLOCKS * _SAMPLE_BYTES:
                file.seek(start)
                return hashlib.sha256(file.read(tensor.nbytes)).digest()
            digest = hashlib.sha256()
            for offset in np.linspace(0, tensor.nbytes - _SAMPLE_BYTES, _SAMPLE_BLOCKS).astype(np.int64):
                file.seek(start + int(offset))
                digest.update(file.read(_SAMPLE_BYTES))
            return digest.digest()
    data = tensor.tobytes()
    if not sampled or len(data) <= _SAMPLE_BLOCKS * _SAMPLE_BYTES:
        return hashlib.sha256(data).digest()
    digest = hashlib.sha256()
    for offset in np.linspace(0, len(data) - _SAMPLE_BYTES, _SAMPLE_BLOCKS).astype(np.int64):
        digest.update(data[offset : offset + _SAMPLE_BYTES])
    return digest.digest()


# Shapes


def opset_version(model: ir.Model) -> int:
    """The version of the ONNX operators that the model imports."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model's graph without its weights: those over 1 KiB become inputs of their shape and type.

    Every weight has the shape that it has, whatever was declared beside it: onnx refuses to infer a whole graph for one
    scalar that is declared as [1] (seen after onnxruntime's fusions).
    """
    bare = copy(model)
    for name, value in list(bare.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        value.shape, value.dtype = ir.Shape(_sizes(tensor)), tensor.dtype
        if tensor.nbytes > _SHAPE_BYTES:
            bare.graph.initializers.pop(name)
            if not value.is_graph_input():
                bare.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):  # inference does not open files
            value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
    return ir.to_proto(bare)


def _sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """A weight's shape; weights have no symbolic sizes."""
    return tuple(size for size in tensor.shape if isinstance(size, int))


def infer_shapes(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    """Shapes of the main graph's values by name, from onnx's shape inference; the model is left as it is.

    Weights of more than 1 KiB are left out of the inference, so that none is read; small ones are kept, since shapes
    are computed from them.

    Raises:
        ModelFileError: The shapes in the graph contradict each other.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton(model), data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ModelFileError(
            "the model",
            expected="nodes whose shapes fit together",
            found=str(error),
            advice="Check the model with onnx.checker, and export it again.",
        ) from error
    shapes: dict[str, tuple[int | str | None, ...]] = {name: _sizes(tensor) for name, tensor in weights(model).items()}
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        if info.type.tensor_type.HasField("shape"):
            shapes[info.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
                for dim in info.type.tensor_type.shape.dim
            )
    return shapes


def _attributes(model: ir.Model) -> Iterator[ir.Attr]:
    return (attribute for node in model.graph.all_nodes() for attribute in node.attributes.values())


def _texts(model: ir.Model) -> Iterator[object]:
    """What must be text. Bytes that are none are handed on by protobuf as bytes, and break what comes later."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string)
    yield from (graph.name for graph in model.graphs())
    yield from (text for entry in model.metadata_props.items() for text in entry)
    yield from names(model)
    for node in model.graph.all_nodes():
        yield from (node.op_type, node.domain, node.overload, node.doc_string, *node.attributes)


def undefined_value(model: ir.Model) -> str | None:
    """The name of a value that is used before any node computes it, if there is one: such a graph cannot be copied."""
    return _undefined(model.graph, frozenset())


def _undefined(graph: ir.Graph, outer: Set[ir.Value]) -> str | None:
    known = {*outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                return str(value.name)
        for attribute in node.attributes.values():
            for subgraph in _subgraphs(attribute):
                missing = _undefined(subgraph, known)
                if missing is not None:
                    return missing
        known.update(node.outputs)
    return next((str(value.name) for value in graph.outputs if value not in known), None)


def _subgraphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type is ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else ()


def names(model: ir.Model) -> set[str]:
    """Every name in use: of nodes, values and weights, subgraphs included."""
    found = {node.name for node in model.graph.all_nodes()}
    for graph in model.graphs():
        found |= {value.name for value in (*graph.inputs, *graph.initializers.values())}
        found |= {value.name for node in graph for value in node.outputs}
    return {name for name in found if name}


def unique_name(model: ir.Model, wanted: str) -> str:
    """`wanted`, or `wanted_2`, `wanted_3`, ... where a value or node of the main graph has that name already."""
    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    taken |= {value.name for value in model.graph.inputs} | {node.name for node in model.graph}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name
