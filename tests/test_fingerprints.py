"""A fingerprint moves with everything that a runtime or a provider may read, and with every byte of the weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Net
from onnx import TensorProto, helper, numpy_helper

from atpatch_onnx import graph
from atpatch_onnx.graph import digests, fingerprints

NET = Net(layers=1, y_in_if=True)
WEIGHT = "layer0/q/weight"

Change = Callable[[onnx.ModelProto], object]


def rich() -> onnx.ModelProto:
    """A model with one of everything."""
    proto = NET.proto()
    proto.ir_version = 11
    proto.metadata_props.add(key="k", value="v")
    proto.graph.metadata_props.add(key="k", value="v")
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    proto.graph.initializer[0].metadata_props.add(key="k", value="v")
    proto.graph.input[0].metadata_props.add(key="k", value="v")
    for name in ("x", WEIGHT, "layer0/Y"):
        proto.graph.quantization_annotation.add(tensor_name=name).quant_parameter_tensor_names.add(key="k", value="v")
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"bc"]))
    for number in range(2):
        branch(proto, number).initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "own"))
        branch(proto, number).quantization_annotation.add(tensor_name="own").quant_parameter_tensor_names.add(key="k")
    proto.configuration.add(name="pair", num_devices=2)
    proto.graph.node[0].device_configurations.add(configuration_id="pair", pipeline_stage=1)
    relu = helper.make_node("LeakyRelu", ["a"], ["b"], alpha=0.5)
    imports = [helper.make_opsetid("", 18)]
    default = helper.make_attribute("by", 1)
    for overload in ("", "o"):
        made = helper.make_function("own", "f", ["a"], ["b"], [relu], imports, [], [default], overload=overload)
        made.metadata_props.add(key="k", value="v")
        made.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1]))
        proto.functions.append(made)
    proto.opset_import.append(helper.make_opsetid("own", 1))
    proto.graph.node.append(helper.make_node("f", ["x"], ["end"], domain="own"))
    return proto


def branch(proto: onnx.ModelProto, number: int) -> onnx.GraphProto:
    return next(node for node in proto.graph.node if node.op_type == "If").attribute[number].g


def entry(holder: Callable[[onnx.ModelProto], object]) -> Change:
    return lambda proto: setattr(holder(proto)[0], "value", "w")


def weight(holder: Callable[[onnx.ModelProto], TensorProto]) -> Change:
    return lambda proto: setattr(holder(proto), "raw_data", holder(proto).raw_data[:-1] + b"\1")


CHANGES: dict[str, Change] = {
    "metadata of the model": entry(lambda proto: proto.metadata_props),
    "metadata of the graph": entry(lambda proto: proto.graph.metadata_props),
    "metadata of a node": entry(lambda proto: proto.graph.node[0].metadata_props),
    "metadata of a weight": entry(lambda proto: proto.graph.initializer[0].metadata_props),
    "metadata of an input": entry(lambda proto: proto.graph.input[0].metadata_props),
    "metadata of a function": entry(lambda proto: proto.functions[0].metadata_props),
    **{
        f"quantization of {name}": entry(
            lambda proto, number=number: proto.graph.quantization_annotation[number].quant_parameter_tensor_names
        )
        for number, name in enumerate(("an input", "a weight", "a value"))
    },
    "quantization in a branch": entry(
        lambda proto: branch(proto, 0).quantization_annotation[0].quant_parameter_tensor_names
    ),
    "a quantization that is gone": lambda proto: proto.graph.quantization_annotation.pop(),
    "text in a weight": lambda proto: proto.graph.initializer[-1].string_data.__setitem__(0, b"b"),
    "where text ends": lambda proto: proto.graph.initializer[-1].string_data.__setitem__(slice(2), [b"ab", b"c"]),
    "a weight of the first branch": weight(lambda proto: branch(proto, 0).initializer[0]),
    "a weight of the second branch": weight(lambda proto: branch(proto, 1).initializer[0]),
    "devices": lambda proto: setattr(proto.configuration[0], "num_devices", 3),
    "the stage of a node": lambda proto: setattr(
        proto.graph.node[0].device_configurations[0], "pipeline_stage", 2
    ),
    "a function's node": lambda proto: setattr(proto.functions[0].node[0], "op_type", "Relu"),
    "a function's attribute": lambda proto: setattr(proto.functions[0].node[0].attribute[0], "f", 0.25),
    "a function's default": lambda proto: setattr(proto.functions[0].attribute_proto[0], "i", 2),
    "a function's opset": lambda proto: setattr(proto.functions[0].opset_import[0], "version", 17),
    "a function's types": lambda proto: setattr(proto.functions[0].value_info[0].type.tensor_type, "elem_type", 10),
    "an overload": lambda proto: setattr(proto.functions[1], "overload", "p"),
    "an overload's node": lambda proto: setattr(proto.functions[1].node[0], "op_type", "Relu"),
    "the overload that is called": lambda proto: setattr(proto.graph.node[-1], "overload", "o"),
    "the domain's version": lambda proto: setattr(proto.opset_import[-1], "version", 2),
}  # fmt: skip


def found(tmp_path: Path, change: Change) -> str:
    proto = rich()
    change(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return graph.fingerprint(graph.load(path))


@pytest.mark.parametrize("case", CHANGES)
def test_fingerprints_move(tmp_path: Path, case: str) -> None:
    assert found(tmp_path, CHANGES[case]) != found(tmp_path, lambda proto: None)


def test_fingerprints_do_not_move_by_themselves(tmp_path: Path) -> None:
    assert len({found(tmp_path, lambda proto: None) for _ in range(3)}) == 1


# Large models


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "IN_ONE", 100)
    monkeypatch.setattr(digests, "BLOCK", 1000)
    monkeypatch.setattr(digests, "_CHUNK", 64)


def stored(folder: Path, array: np.ndarray) -> Path:
    proto = NET.proto()
    proto.graph.initializer.append(numpy_helper.from_array(array, "big"))
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="big.data", size_threshold=1024)
    return path


@pytest.mark.usefixtures("large")
def test_every_byte_of_a_large_model_counts(tmp_path: Path) -> None:
    numbers = np.arange(1100, dtype=np.float32)
    path = stored(tmp_path, numbers)
    before = graph.fingerprint(graph.load(path))
    assert before.startswith("sha256-blocks:")
    data = tmp_path / "big.data"
    whole = data.read_bytes()
    for at in (0, 777, 999, 1000, 2500, len(whole) - 1):
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert graph.fingerprint(graph.load(path)) != before, at


@pytest.mark.usefixtures("large")
def test_large_models_have_one_fingerprint_wherever_they_are_stored(tmp_path: Path) -> None:
    numbers = np.zeros(110_000, np.float32)
    numbers[-3] = 1
    path = stored(tmp_path, numbers)
    proto = onnx.load(path)
    inside = ir.from_proto(proto)
    data = tmp_path / "big.data"
    before = graph.fingerprint(graph.load(path))
    content = data.read_bytes()
    with data.open("wb") as file:  # holes where there are zeros
        file.truncate(len(content))
        file.seek(len(content) // 4096 * 4096 - 4096)
        file.write(content[file.tell() :])
    assert data.stat().st_blocks * 512 < len(content)
    assert graph.fingerprint(graph.load(path)) == before == graph.fingerprint(inside)
    for value in inside.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    assert graph.fingerprint(inside) == before
