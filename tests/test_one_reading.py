"""A file that two readers could understand differently is refused at load, with its place; a sound one is not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Net, session
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from atpatch_onnx import graph
from atpatch_onnx.cli import main
from atpatch_onnx.errors import ModelFileError

Change = Callable[[onnx.ModelProto], object]

NET = Net(layers=1, y_in_if=True)
WEIGHT = "layer0/q/weight"

ENTRY = onnx.StringStringEntryProto(key="location")

UNKNOWN = b"\xf8\x7d\x01"
"""Field 2015, which no message of ONNX has."""


def load(tmp_path: Path, change: Change) -> None:
    proto = NET.proto()
    change(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    graph.load(path)


def node(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == op_type)


def branch(proto: onnx.ModelProto, number: int = 0) -> onnx.GraphProto:
    return node(proto, "If").attribute[number].g


def tensor(name: str = "w", values: tuple[float, ...] = (1, 2)) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.float32), name)


def typed(kind: int, field: str, values: list, dims: list[int]) -> TensorProto:
    made = TensorProto(name="w", data_type=kind, dims=dims)
    getattr(made, field).extend(values)
    return made


def raw(kind: int, content: bytes, *dims: int) -> TensorProto:
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=content)


def with_tensor(made: TensorProto) -> Change:
    return lambda proto: proto.graph.initializer.append(made)


def changed(**fields: object) -> Change:
    """An initializer of two raw floats with other fields beside them."""
    made = tensor()
    for name, value in fields.items():
        getattr(made, name).extend(value) if isinstance(value, list) else setattr(made, name, value)
    return with_tensor(made)


def segment(proto: onnx.ModelProto) -> None:
    made = tensor()
    made.segment.begin, made.segment.end = 0, 1
    proto.graph.initializer.append(made)


def external(*entries: tuple[str, str], **fields: object) -> Change:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], **fields)
    for key, value in entries:
        made.external_data.add(key=key, value=value)
    return with_tensor(made)


def function(name: str = "f", domain: str = "own", body: tuple[str, ...] = ("Neg",), **options: object) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        names = ["a", *(f"b{number}" for number in range(len(body)))]
        nodes = [
            helper.make_node(op, [names[number]], [names[number + 1]], domain="" if op == "Neg" else "own")
            for number, op in enumerate(body)
        ]
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        proto.functions.append(helper.make_function(domain, name, ["a"], [names[-1]], nodes, imports, **options))

    return change


def both(*changes: Change) -> Change:
    return lambda proto: [change(proto) for change in changes]


def chain(length: int, *, calls: int = 1) -> Change:
    return both(function("f0"), *(function(f"f{n}", body=(f"f{n - 1}",) * calls) for n in range(1, length)))


def attribute(proto: onnx.ModelProto, **fields: object) -> AttributeProto:
    return node(proto, "Softmax").attribute.add(**fields)


def graph_value(group: str, name: str, kind: int, shape: list) -> Change:
    return lambda proto: getattr(proto.graph, group).append(helper.make_tensor_value_info(name, kind, shape))


def annotated(proto: onnx.ModelProto) -> None:
    for _ in range(2):
        proto.graph.quantization_annotation.add(tensor_name=WEIGHT)


def sparse(proto: onnx.ModelProto) -> None:
    indices = numpy_helper.from_array(np.array([1], np.int64))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor("s", (1,)), indices, [4]))


def mapped(proto: onnx.ModelProto) -> None:
    kind = proto.graph.input.add(name="m").type.map_type
    kind.key_type = TensorProto.STRING


def unknown(message: Callable[[onnx.ModelProto], object]) -> Change:
    return lambda proto: message(proto).MergeFromString(UNKNOWN)


FLOAT, INT32, BOOL, INT8, INT4 = (
    TensorProto.DataType.Value(name) for name in ("FLOAT", "INT32", "BOOL", "INT8", "INT4")
)

AMBIGUOUS: dict[str, tuple[Change, str]] = {
    # a name given twice
    "initializer": (lambda proto: proto.graph.initializer.append(tensor(WEIGHT)), f"the initializer '{WEIGHT}' twice"),
    "initializer of a branch": (lambda proto: branch(proto).initializer.extend([tensor(), tensor()]), "'w' twice"),
    "initializer that hides another": (lambda proto: branch(proto).initializer.append(tensor(WEIGHT)), "which one has"),
    "initializer that is computed": (lambda proto: proto.graph.initializer.append(tensor("layer0/Y")), "there already"),
    "input": (lambda proto: proto.graph.input.append(proto.graph.input[0]), "the input 'x' twice"),
    "value": (lambda proto: proto.graph.node.append(helper.make_node("Neg", ["x"], ["layer0/Y"])), "there already"),
    "value of a branch that hides another": (lambda proto: branch(proto).node.add(op_type="Neg", output=["x"]), "'x'"),
    "attribute": (lambda proto: attribute(proto, name="axis", type=AttributeProto.INT, i=1), "'axis' twice"),
    "opset import": (lambda proto: proto.opset_import.add(domain="", version=17), "versions 18 and 17"),
    "alias of a domain": (lambda proto: proto.opset_import.add(domain="ai.onnx", version=17), "'ai.onnx'"),
    "function": (both(function(), function()), "two of this domain"),
    "function of an alias": (both(function(domain="ai.onnx")), "domain of operators"),
    "function that shadows an operator": (function("Relu", ""), "domain of operators"),
    "function that shadows one of onnxruntime": (function("Gelu", "com.microsoft"), "domain of operators"),
    "overload that older readers ignore": (
        both(function(overload="a"), lambda proto: setattr(proto, "ir_version", 9)),
        "IR version 9",
    ),
    "overload that nobody has": (lambda proto: setattr(node(proto, "Softmax"), "overload", "a"), "the overload 'a'"),
    "metadata": (lambda proto: [proto.metadata_props.add(key="k", value=value) for value in "ab"], "'k' twice"),
    "metadata of a node": (lambda proto: [proto.graph.node[0].metadata_props.add(key="k") for _ in "ab"], "'k' twice"),
    "annotation": (annotated, "annotation of"),
    "type of a value": (graph_value("value_info", "x", INT32, ["batch", "tokens", 8]), "contradict each other"),
    "size of a value": (graph_value("value_info", "x", FLOAT, ["batch", "tokens", 9]), "contradict each other"),
    "rank of a value": (graph_value("value_info", "x", FLOAT, ["batch", 8]), "contradict each other"),
    "type of a weight": (graph_value("value_info", WEIGHT, INT32, [8, 8]), "one type of"),
    # contents
    "raw and typed data": (changed(float_data=[1.0, 2.0]), "raw_data and float_data"),
    "raw and foreign data": (changed(int32_data=[1, 2]), "raw_data and int32_data"),
    "two typed fields": (
        both(with_tensor(TensorProto(name="w", data_type=FLOAT, dims=[1], float_data=[1], int64_data=[2]))),
        "float_data and int64_data",
    ),
    "a foreign typed field": (with_tensor(typed(FLOAT, "int32_data", [1, 2], [2])), "some in int32_data"),
    "too many entries": (with_tensor(typed(FLOAT, "float_data", [1, 2, 3], [2])), "3 for"),
    "too few entries": (with_tensor(typed(INT4, "int32_data", [1], [3])), "1 for"),
    "an entry that does not fit": (with_tensor(typed(INT8, "int32_data", [1000], [1])), "1000 to 1000"),
    "a bool that is neither": (with_tensor(typed(BOOL, "int32_data", [2], [1])), "2 to 2"),
    "a raw bool that is neither": (with_tensor(raw(BOOL, b"\2", 1)), "byte 2"),
    "a branch that returns a value around it": (lambda proto: setattr(branch(proto).output[0], "name", "x"), "'x'"),
    "a negative size": (with_tensor(raw(FLOAT, bytes(8), -1, -2)), "shape"),
    "a size that overflows": (with_tensor(raw(FLOAT, b"", 2**32, 2**32)), "shape"),
    "a segment": (segment, "a segment"),
    "external and inline data": (external(("location", "d"), data_location=1, raw_data=bytes(8)), "raw_data and"),
    "external data that is not said to be": (changed(external_data=[ENTRY]), "raw_data and external"),
    "an external entry twice": (external(("location", "a"), ("location", "b"), data_location=1), "each entry"),
    "an unknown external entry": (external(("location", "a"), ("basepath", "/"), data_location=1), "'basepath'"),
    "a number in words": (external(("location", "a"), ("offset", "1_0"), data_location=1), "'1_0'"),
    "a sign": (external(("location", "a"), ("length", "+8"), data_location=1), r"'\+8'"),
    # attributes
    "an attribute without a type": (lambda proto: attribute(proto, name="k", i=1), "without a type"),
    "two types of attribute": (lambda proto: attribute(proto, name="k", type=AttributeProto.INT, i=1, f=1), "f"),
    "another type of attribute": (lambda proto: attribute(proto, name="k", type=AttributeProto.INTS, i=1), "in ints"),
    "a graph that is not there": (lambda proto: attribute(proto, name="k", type=AttributeProto.GRAPH), "none"),
    "a reference from nowhere": (
        lambda proto: attribute(proto, name="k", type=AttributeProto.INT, ref_attr_name="z"),
        "no function around it",
    ),
    # what the schema does not know
    "an unknown field of the model": (unknown(lambda proto: proto), "field 2015 of a ModelProto"),
    "an unknown field of a type": (unknown(lambda proto: proto.graph.input[0].type), "field 2015 of a TypeProto"),
    "an unknown field of a branch": (unknown(lambda proto: branch(proto).node[0]), "field 2015 of a NodeProto"),
    "an unknown field of a weight": (unknown(lambda proto: proto.graph.initializer[0]), "field 2015 of a TensorProto"),
    "a kind of attribute that nobody has": (
        lambda proto: node(proto, "Softmax").attribute[0].MergeFromString(b"\xa0\x01\x63"),
        "field 20 of a AttributeProto",
    ),
    "a name with an end in it": (lambda proto: setattr(proto.graph.node[0], "name", "a\0b"), "NUL"),
    # what would be lost
    "training": (lambda proto: proto.training_info.add(), "how to train it"),
    "sparse initializers": (sparse, "sparse initializers.*Store them as dense"),
    "maps": (mapped, "a map"),
    # nodes that are not what their operators are
    "too few inputs": (lambda proto: node(proto, "MatMul").input.pop(), "2 to 2 inputs"),
    "too many outputs": (lambda proto: node(proto, "MatMul").output.append("more"), "1 to 1 outputs"),
    "an input left out": (lambda proto: node(proto, "MatMul").input.__setitem__(0, ""), "an input 0"),
    "an attribute left out": (lambda proto: node(proto, "If").attribute.pop(), "the attribute"),
    "an attribute of another type": (
        lambda proto: node(proto, "Softmax").attribute[0].CopyFrom(helper.make_attribute("axis", "last")),
        "type INT",
    ),
    "an axis twice": (lambda proto: node(proto, "Transpose").attribute[0].ints.__setitem__(0, 1), "'perm'"),
    "a version before the first": (lambda proto: setattr(proto.opset_import[0], "version", 0), "version 0"),
    "a device of nobody": (
        lambda proto: proto.graph.node[0].device_configurations.add(configuration_id="pair"),
        "a device configuration",
    ),
    # functions that do not end
    "a function that calls itself": (function("f", body=("f",)), "calls itself"),
    "functions in a circle": (both(function("f", body=("g",)), function("g", body=("f",))), "calls itself"),
    "functions that call each other twice": (chain(40, calls=2), "unfold"),
    "functions within each other": (chain(80), "within each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_readers_understand_differently_is_refused(tmp_path: Path, case: str) -> None:
    change, found = AMBIGUOUS[case]
    with pytest.raises(ModelFileError, match=found) as raised:
        load(tmp_path, change)
    said = str(raised.value)
    assert said.startswith(str(tmp_path / "model.onnx"))
    assert said.count("\n") == 0


def one_more_branch(proto: onnx.ModelProto) -> None:
    """Both branches may have the same names, and the outer graph that of their results."""
    for number in range(2):
        branch(proto, number).initializer.append(tensor("w"))
        branch(proto, number).node[-1].output[0] = branch(proto, number).output[0].name = "from_if"


SOUND: dict[str, Change] = {
    "as it is": lambda proto: None,
    "names of branches": one_more_branch,
    "an input with a default": lambda proto: proto.graph.input.append(
        helper.make_tensor_value_info(WEIGHT, FLOAT, [8, 8])
    ),
    "an output given out twice": lambda proto: proto.graph.output.append(proto.graph.output[0]),
    "a value declared twice": graph_value("value_info", "x", FLOAT, ["b", None, 8]),
    "a weight declared as another shape": graph_value("value_info", "layer0/scale", FLOAT, [1]),
    "an alias of the same version": lambda proto: proto.opset_import.add(domain="ai.onnx", version=18),
    "a node of an alias": lambda proto: setattr(node(proto, "Softmax"), "domain", "ai.onnx"),
    "functions of its own": chain(20),
    "overloads": both(function(overload="a"), function(overload="b"), lambda proto: setattr(proto, "ir_version", 10)),
    "a weight of no elements": lambda proto: proto.graph.initializer.append(tensor(values=())),
    "a weight whose content is not in the file": lambda proto: proto.graph.initializer.append(
        TensorProto(name="w", data_type=FLOAT, dims=[3])
    ),
    "negative numbers in int32_data": with_tensor(typed(INT8, "int32_data", [-128, 127], [2])),
    "packed numbers": with_tensor(typed(INT4, "int32_data", [0x21, 0x03], [3])),
    "line breaks in a doc string": lambda proto: setattr(proto.graph.node[0], "doc_string", "a\n\0b"),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_files_are_read(tmp_path: Path, case: str) -> None:
    load(tmp_path, SOUND[case])


@pytest.mark.parametrize(("size", "chosen"), [(2, 2), (200, 1)])
def test_which_of_two_initializers_runs_depends_on_their_size(tmp_path: Path, size: int, chosen: int) -> None:
    """Why: onnxruntime takes the first of two large ones, onnx-ir the last; so what was verified was not what ran."""
    proto = NET.proto()
    for number in (1, 2):
        proto.graph.initializer.insert(number - 1, tensor("twice", (number,) * size))
    proto.graph.node.append(helper.make_node("Identity", ["twice"], ["answer"]))
    proto.graph.output.append(helper.make_tensor_value_info("answer", FLOAT, [size]))
    opened: ort.InferenceSession = session(proto)
    (answer,) = opened.run(["answer"], NET.feed(np.random.default_rng(0)))
    assert answer[0] == chosen
    with pytest.raises(ModelFileError, match="'twice' twice"):
        load(tmp_path, lambda own: own.CopyFrom(proto))


@pytest.mark.parametrize(
    "name", ["a\nb", "\x1b[2J\x1b]0;own\x07", "\u202egnp.exe", "<script>alert(1)</script>", "../../x"]
)
def test_names_in_messages_are_harmless(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks, escapes of terminals and marks of direction are spelt out."""
    proto = NET.proto()
    proto.graph.initializer.extend([tensor(name), tensor(name)])
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert main(["sites", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()


@given(name=st.text())
def test_any_text_in_a_message_is_one_harmless_line(name: str) -> None:
    error = ModelFileError(name, expected=name, found=repr(name), advice=f"{name}.")
    assert str(error).isprintable()
    assert "\n" not in str(error)


def test_names_without_an_end_are_cut(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as raised:
        load(tmp_path, lambda proto: proto.graph.initializer.extend([tensor("w" * 10**6)] * 2))
    assert len(str(raised.value)) < 10_000
