"""Files: what is no sound model is refused with a reason, and what is written is whole or not there at all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Net, draw_patch, run, same_bits
from onnx import TensorProto, helper, numpy_helper

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph import writing
from atpatch_onnx.matching import find_sites

NET = Net(layers=1)
RAW = NET.proto().SerializeToString()

drawn = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def saved(path: Path, proto: onnx.ModelProto | None = None) -> Path:
    onnx.save(NET.proto() if proto is None else proto, path)
    return path


def saved_externally(folder: Path, location: str = "weights.data", threshold: int = 0) -> Path:
    """The model with all weights in one external data file."""
    path = folder / "model.onnx"
    onnx.save(
        NET.proto(),
        path,
        save_as_external_data=True,
        location=location,
        size_threshold=threshold,
        convert_attribute=False,
    )
    return path


# Not an ONNX file


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"just some text\n", b'{"json": true}', b"\xff" * 100, b"PK\x03\x04" + bytes(100), b"\x08\x08"],
    ids=["empty", "zero", "text", "json", "ones", "zip", "only-a-version"],
)
def test_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        graph.load(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="nothing there"):
        graph.load(tmp_path / "none.onnx")
    with pytest.raises(ModelFileError, match="a folder"):
        graph.load(tmp_path)


@drawn
@given(content=st.binary(min_size=1, max_size=400))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        graph.load(path)


def test_truncated_at_many_offsets(tmp_path: Path) -> None:
    """A file that is cut short is refused, wherever it is cut: its last field, the opset, is not optional."""
    path = tmp_path / "cut.onnx"
    for length in sorted({*range(400), *range(0, len(RAW), 37), *range(len(RAW) - 60, len(RAW))}):
        path.write_bytes(RAW[:length])
        with pytest.raises(ModelFileError):
            graph.load(path)


@drawn
@given(offset=st.integers(0, len(RAW) - 1), bit=st.integers(0, 7))
def test_flipped_bits_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int
) -> None:
    raw = bytearray(RAW)
    raw[offset] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.onnx"
    path.write_bytes(bytes(raw))
    try:
        model = graph.load(path)
    except ModelFileError:
        return
    graph.fingerprint(model)
    graph.to_bytes(model)


@pytest.mark.parametrize("place", ["graph", "branch", "output"])
def test_values_that_nobody_computes(tmp_path: Path, place: str) -> None:
    proto = Net(layers=1, y_in_if=True).proto()
    if place == "graph":
        next(node for node in proto.graph.node if node.op_type == "Softmax").input[0] = "nowhere"
    elif place == "branch":
        node = next(node for node in proto.graph.node if node.op_type == "If")
        node.attribute[0].g.node[0].input[0] = "nowhere"
    else:
        proto.graph.output[0].name = "nowhere"
    with pytest.raises(ModelFileError, match="nowhere"):
        graph.load(saved(tmp_path / "model.onnx", proto))


# External data


def test_external_data_is_read_where_it_lies(tmp_path: Path) -> None:
    model = graph.load(saved_externally(tmp_path))
    feed = NET.feed(np.random.default_rng(0))
    assert graph.external_folder(model) == tmp_path.resolve()
    base, found = run(NET.proto(), feed), run(onnx.load(tmp_path / "model.onnx"), feed)
    assert all(same_bits(found[name], value) for name, value in base.items())


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    path = saved_externally(tmp_path)
    data = tmp_path / "weights.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ModelFileError, match="cut short"):
        graph.load(path)
    data.unlink()
    with pytest.raises(ModelFileError, match="nothing there"):
        graph.load(path)
    data.mkdir()
    with pytest.raises(ModelFileError, match="nothing there"):
        graph.load(path)


def with_entry(path: Path, key: str, value: str) -> Path:
    """Another entry in the external data of the first weight."""
    proto = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    kept = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, text in kept.items():
        tensor.external_data.add(key=name, value=text)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "-1"),
        ("offset", "10000000"),
        ("offset", "many"),
        ("offset", "1e3"),
        ("length", "-8"),
        ("length", "1"),
        ("length", "99999999999999999999"),
        ("length", ""),
        ("location", ""),
        ("location", "."),
        ("location", "nowhere.data"),
    ],
)
def test_external_data_entries_that_do_not_fit(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ModelFileError):
        graph.load(with_entry(saved_externally(tmp_path), key, value))


def escape_by_absolute_path(folder: Path, secret: Path) -> str:
    return str(secret)


def escape_by_parent_folder(folder: Path, secret: Path) -> str:
    return "../outside/secret.data"


def escape_by_detour(folder: Path, secret: Path) -> str:
    (folder / "sub").mkdir()
    return "sub/../../outside/secret.data"


def escape_by_file_link(folder: Path, secret: Path) -> str:
    (folder / "link.data").symlink_to(secret)
    return "link.data"


def escape_by_folder_link(folder: Path, secret: Path) -> str:
    (folder / "sub").symlink_to(secret.parent)
    return "sub/secret.data"


def escape_by_chain_of_links(folder: Path, secret: Path) -> str:
    (folder / "one.data").symlink_to("two.data")
    (folder / "two.data").symlink_to("../outside/secret.data")
    return "one.data"


ESCAPES = (
    escape_by_absolute_path,
    escape_by_parent_folder,
    escape_by_detour,
    escape_by_file_link,
    escape_by_folder_link,
    escape_by_chain_of_links,
)


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.__name__)
def test_external_data_outside_the_models_folder(tmp_path: Path, escape: Callable[[Path, Path], str]) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    path = saved_externally(inside)
    secret = outside / "secret.data"
    (inside / "weights.data").rename(secret)
    with pytest.raises(ModelFileError, match="inside the model's folder"):
        graph.load(with_entry(path, "location", escape(inside, secret)))


def test_external_data_of_branches_and_constants_is_checked_too(tmp_path: Path) -> None:
    proto = Net(layers=1, y_in_if=True).proto()
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.data")
    branch = next(node for node in proto.graph.node if node.op_type == "If").attribute[0].g
    branch.node.insert(0, helper.make_node("Constant", [], ["unused"], value=tensor))
    with pytest.raises(ModelFileError, match="inside the model's folder"):
        graph.load(saved(tmp_path / "model.onnx", proto))
    proto = Net(layers=1).proto()
    function = helper.make_function(
        "local", "f", [], ["y"], [helper.make_node("Constant", [], ["y"], value=tensor)], [helper.make_opsetid("", 18)]
    )
    proto.functions.append(function)
    with pytest.raises(ModelFileError, match="inside the model's folder"):
        graph.load(saved(tmp_path / "model.onnx", proto))


def test_links_inside_the_models_folder_are_fine(tmp_path: Path) -> None:
    path = saved_externally(tmp_path)
    (tmp_path / "weights.data").rename(tmp_path / "real.data")
    (tmp_path / "weights.data").symlink_to("real.data")
    assert graph.fingerprint(graph.load(path)) == graph.fingerprint(NET.model())


# Saving


def test_external_data_goes_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    model = graph.load(saved_externally(source))
    baked = bake(model, draw_patch(model))
    graph.save(baked, target / "patched.onnx")
    assert sorted(file.name for file in target.iterdir()) == ["patched.onnx", "weights.data"]
    assert (target / "weights.data").samefile(source / "weights.data") is False
    assert (target / "weights.data").read_bytes() == (source / "weights.data").read_bytes()
    again = graph.load(target / "patched.onnx")
    assert graph.fingerprint(unbake(again)) == graph.fingerprint(model)
    graph.save(baked, target / "patched.onnx")


def test_saving_beside_the_base_shares_its_data(tmp_path: Path) -> None:
    model = graph.load(saved_externally(tmp_path))
    before = (tmp_path / "weights.data").stat()
    graph.save(bake(model, draw_patch(model)), tmp_path / "patched.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "patched.onnx", "weights.data"]
    assert (tmp_path / "weights.data").stat().st_mtime_ns == before.st_mtime_ns
    assert (tmp_path / "patched.onnx").stat().st_size < before.st_size + 100_000


def test_another_file_in_the_way_of_the_data(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    model = graph.load(saved_externally(source))
    (target / "weights.data").write_bytes(b"precious")
    with pytest.raises(ModelFileError, match="no other file"):
        graph.save(model, target / "model.onnx")
    assert (target / "weights.data").read_bytes() == b"precious"
    assert [file.name for file in target.iterdir()] == ["weights.data"]


def test_data_is_not_written_through_links_to_elsewhere(tmp_path: Path) -> None:
    source, target, outside = (tmp_path / name for name in ("source", "target", "outside"))
    for folder in (source, source / "sub", target, outside):
        folder.mkdir()
    model = graph.load(saved_externally(source, "sub/weights.data"))
    (target / "sub").symlink_to(outside)
    with pytest.raises(ModelFileError, match="inside"):
        graph.save(model, target / "model.onnx")
    assert list(outside.iterdir()) == []
    assert [file.name for file in target.iterdir()] == ["sub"]


def test_saving_replaces_the_file_at_once(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.onnx")
    model = graph.load(path)
    graph.save(model, path)
    first = path.read_bytes()
    graph.save(model, path)
    assert path.read_bytes() == first == graph.to_bytes(model)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"], "no staging folder is left"


@pytest.mark.parametrize("in_the_way", ["no folder", "a folder of that name"])
def test_a_failure_leaves_nothing(tmp_path: Path, in_the_way: str) -> None:
    target = tmp_path / "target"
    if in_the_way == "a folder of that name":
        (target / "model.onnx").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelFileError, match="can be written"):
        graph.save(NET.model(), target / "model.onnx")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "model.onnx")
    before = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ModelFileError, match="No space left"):
        graph.save(NET.model(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_large_weights_in_memory_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PROTOBUF_LIMIT", 100)
    model = NET.model()
    graph.save(model, tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert graph.fingerprint(graph.load(tmp_path / "model.onnx")) == graph.fingerprint(NET.model())


# Fingerprints


def test_fingerprints_do_not_depend_on_storage(tmp_path: Path) -> None:
    wanted = graph.fingerprint(NET.model())
    for folder, threshold in (("all", 0), ("some", 200)):
        (tmp_path / folder).mkdir()
        assert graph.fingerprint(graph.load(saved_externally(tmp_path / folder, threshold=threshold))) == wanted
    assert graph.fingerprint(graph.load(saved(tmp_path / "inline.onnx"))) == wanted
    proto = NET.proto()
    for tensor in proto.graph.initializer:  # typed fields in place of raw bytes
        array = numpy_helper.to_array(tensor)
        flat = helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.ravel().tolist())
        tensor.CopyFrom(flat)
    assert graph.fingerprint(graph.load(saved(tmp_path / "typed.onnx", proto))) == wanted


def _weight(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[-1] = np.nextafter(array.flat[-1], np.float32(9))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _reshaped(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(array.reshape(-1, 2), tensor.name))


CHANGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "weight": _weight,
    "weight's shape": _reshaped,
    "attribute": lambda proto: setattr(
        next(node for node in proto.graph.node if node.op_type == "Softmax").attribute[0], "i", 3
    ),
    "node removed": lambda proto: proto.graph.node.pop(),
    "nodes swapped": lambda proto: proto.graph.node.insert(0, proto.graph.node.pop()),
    "node renamed": lambda proto: setattr(proto.graph.node[0], "name", "other"),
    "operator": lambda proto: setattr(proto.graph.node[-1], "op_type", "Sub"),
    "domain": lambda proto: setattr(proto.graph.node[-1], "domain", "other"),
    "output renamed": lambda proto: setattr(proto.graph.output[0], "name", "layer0/out"),
    "input's shape": lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "other"),
    "opset": lambda proto: setattr(proto.opset_import[0], "version", 19),
    "IR version": lambda proto: setattr(proto, "ir_version", 9),
    "metadata": lambda proto: proto.metadata_props.add(key="a", value="b"),
    "graph's name": lambda proto: setattr(proto.graph, "name", "other"),
    "producer": lambda proto: setattr(proto, "producer_name", "other"),
}


def test_fingerprints_notice_every_change() -> None:
    found = {"": graph.fingerprint(NET.model())}
    for name, change in CHANGES.items():
        proto = NET.proto()
        change(proto)
        found[name] = graph.fingerprint(ir.from_proto(proto))
    assert len(set(found.values())) == len(found), found


def test_looking_at_a_constant_leaves_it_alone() -> None:
    held = ir.tensor([1, 2])
    node = ir.node("Constant", [], {"value": held})
    node.outputs[0].name = "axes"
    assert graph.constant(node.outputs[0]) is held
    assert held.name is None


@pytest.mark.parametrize(
    ("attributes", "content"),
    [
        ({"value_ints": [1, 2]}, [1, 2]),
        ({"value_float": 0.5}, 0.5),
        ({"value": ir.tensor([3.0])}, [3.0]),
        ({"value_string": "text"}, None),
        ({"value_ints": [1], "value_int": 1}, None),
        ({}, None),
    ],
)
def test_what_a_constant_holds(attributes: dict, content: object) -> None:
    node = ir.node("Constant", [], attributes)
    found = graph.constant(node.outputs[0])
    assert (None if found is None else found.numpy().tolist()) == content
    assert graph.constant(ir.node("Relu", [node.outputs[0]]).outputs[0]) is None


def test_fingerprints_notice_changes_inside_branches() -> None:
    proto = Net(y_in_if=True).proto()
    before = graph.fingerprint(ir.from_proto(proto))
    node = next(node for node in proto.graph.node if node.op_type == "If")
    node.attribute[0].g.node[0].op_type = "Exp"
    assert graph.fingerprint(ir.from_proto(proto)) != before


# Shapes


def test_shapes_are_inferred_without_reading_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph.load(saved_externally(tmp_path, threshold=1024))

    def read(_: ir.ExternalTensor) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(ir.ExternalTensor, "numpy", read)
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", read)
    assert graph.infer_shapes(model)["layer0/Y"] == ("batch", 2, "tokens", 4)
    assert len(find_sites(model)) == 1


def test_shapes_that_contradict_each_other(tmp_path: Path) -> None:
    proto = NET.proto()
    next(node for node in proto.graph.node if node.op_type == "Reshape").input.pop()
    with pytest.raises(ModelFileError, match="2 to 2 inputs"):
        graph.load(saved(tmp_path / "model.onnx", proto))
    with pytest.raises(ModelFileError, match="fit together"):
        graph.infer_shapes(ir.from_proto(proto))


def test_weights_whose_bytes_do_not_fit_their_shape(tmp_path: Path) -> None:
    proto = NET.proto()
    proto.graph.initializer[0].dims[0] += 1
    with pytest.raises(ModelFileError, match="bytes for"):
        graph.load(saved(tmp_path / "model.onnx", proto))
    proto = NET.proto()
    proto.graph.initializer[0].data_type = 99
    with pytest.raises(ModelFileError, match="unknown type"):
        graph.load(saved(tmp_path / "model.onnx", proto))
