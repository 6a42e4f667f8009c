"""External data when a model is saved to another folder: referenced, linked or copied, and read through one check."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from models import Net, draw_patch, same_bits
from onnx import TensorProto, helper, numpy_helper

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph import carrying, external, writing
from atpatch_onnx.matching import find_sites

NET = Net(layers=1, heads=4, kv_heads=4, depth=8)

WAYS = (None, "reference", "link", "copy")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose weights of more than 100 bytes lie beside it, in a separate folder."""
    path = tmp_path / "models" / "base" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(NET.proto(), path, save_as_external_data=True, location="weights.data", size_threshold=100)
    return path


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def outputs(path: Path) -> dict[str, np.ndarray]:
    """What onnxruntime computes from a file."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, NET.feed(np.random.default_rng(0))), strict=True))


# Where it goes


@pytest.mark.parametrize("way", WAYS)
def test_beside_the_base_nothing_moves(base: Path, way: str | None) -> None:
    model = graph.load(base)
    graph.save(bake(model, draw_patch(model)), base.with_name("patched.onnx"), external=way)
    assert files(base.parent) == {"model.onnx", "weights.data", "patched.onnx"}
    assert (base.parent / "weights.data").stat().st_nlink == 1


@pytest.mark.parametrize("way", [None, "reference"])
def test_above_the_base_its_data_is_referenced(base: Path, way: str | None) -> None:
    model = graph.load(base)
    target = base.parent.parent / "again.onnx"
    graph.save(model, target, external=way)
    assert files(target.parent) == {"again.onnx", "base/model.onnx", "base/weights.data"}
    again = graph.load(target)
    assert graph.fingerprint(again) == graph.fingerprint(model)
    assert {str(tensor.location) for tensor in external_tensors(again)} == {"base/weights.data"}
    assert {str(tensor.location) for tensor in external_tensors(model)} == {"weights.data"}, "left as it was"
    assert all(same_bits(outputs(target)[name], value) for name, value in outputs(base).items())


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    return [tensor for tensor in graph.weights(model).values() if isinstance(tensor, ir.ExternalTensor)]


def test_what_lies_elsewhere_cannot_be_referenced(base: Path, elsewhere: Path) -> None:
    with pytest.raises(ModelFileError, match="link or copy"):
        graph.save(graph.load(base), elsewhere / "model.onnx", external="reference")
    assert files(elsewhere) == set()


@pytest.mark.parametrize("way", [None, "link", "copy"])
def test_there_and_back(base: Path, elsewhere: Path, way: str | None) -> None:
    """Patched in another folder, loaded, unbaked, run: the same model, whichever way its data came along."""
    model = graph.load(base)
    before = outputs(base)
    graph.save(bake(model, draw_patch(model)), elsewhere / "patched.onnx", external=way)
    assert files(elsewhere) == {"patched.onnx", "weights.data"}
    unbaked = unbake(graph.load(elsewhere / "patched.onnx"))
    assert graph.fingerprint(unbaked) == graph.fingerprint(model)
    graph.save(unbaked, elsewhere / "model.onnx", external=way)
    assert find_sites(graph.load(elsewhere / "model.onnx")) == find_sites(model)
    after = outputs(elsewhere / "model.onnx")
    assert all(same_bits(after[name], value) for name, value in before.items())


def test_a_copy_is_a_file_of_its_own(base: Path, elsewhere: Path) -> None:
    graph.save(graph.load(base), elsewhere / "model.onnx", external="copy")
    with (elsewhere / "weights.data").open("r+b") as file:
        file.write(bytes(8))
    assert (base.parent / "weights.data").read_bytes() != (elsewhere / "weights.data").read_bytes()


def test_unknown_ways(base: Path, elsewhere: Path) -> None:
    with pytest.raises(ModelFileError, match="reference or link or copy"):
        graph.save(graph.load(base), elsewhere / "model.onnx", external="symlink")


# Links


@pytest.fixture
def no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "_cloned", lambda source, target: False)


@pytest.mark.usefixtures("no_clones")
def test_hard_links_are_read_by_us_and_by_onnxruntime_only(base: Path, elsewhere: Path) -> None:
    """Why a clone comes first: with a hard link, onnx and onnx-ir no longer open the base either."""
    graph.save(graph.load(base), elsewhere / "model.onnx", external="link")
    assert (elsewhere / "weights.data").samefile(base.parent / "weights.data")
    for path in (base, elsewhere / "model.onnx"):
        with pytest.raises(onnx.checker.ValidationError, match="hard link"):
            onnx.load(path)
        with pytest.raises(ValueError, match="hard link"):
            ir.load(path).graph.initializers["layer0/q/weight"].const_value.numpy()
        loaded = graph.load(path).graph.initializers["layer0/q/weight"].const_value
        assert same_bits(loaded.numpy(), NET.model().graph.initializers["layer0/q/weight"].const_value.numpy())
        assert outputs(path)


@pytest.mark.usefixtures("no_clones")
@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_links_that_the_file_system_refuses(
    base: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ModelFileError, match="copy the data"):
        graph.save(graph.load(base), elsewhere / "model.onnx", external="link")
    assert files(elsewhere) == set()


@pytest.mark.parametrize("way", ["link", "copy"])
def test_clones_where_the_file_system_makes_them(
    base: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    fcntl = pytest.importorskip("fcntl")
    calls = []

    def clone(new: object, request: int, old: int) -> int:
        calls.append(request)
        return os.write(new.fileno(), os.pread(old, 10**6, 0))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    graph.save(graph.load(base), elsewhere / "model.onnx", external=way)
    assert calls == [0x40049409]
    assert (elsewhere / "weights.data").read_bytes() == (base.parent / "weights.data").read_bytes()
    assert (elsewhere / "weights.data").stat().st_nlink == 1


# Copies


@pytest.mark.usefixtures("no_clones")
@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="holes cannot be asked for")
def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(2**30)
        for position in (0, 2**28 + 5, 2**30 - 3):
            file.seek(position)
            file.write(b"abc")
    carrying.bring(source, target, None)
    assert target.stat().st_size == 2**30
    assert target.stat().st_blocks * 512 < 2**27
    assert carrying._same_content(source, target)
    with target.open("r+b") as file:
        file.seek(2**29)
        file.write(b"x")
    assert not carrying._same_content(source, target)
    assert not carrying._same_content(target, source)


@pytest.mark.usefixtures("no_clones")
def test_a_copy_that_fails_leaves_nothing(base: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(carrying, "_read", full)
    with pytest.raises(ModelFileError, match="No space left"):
        graph.save(graph.load(base), elsewhere / "model.onnx")
    assert list(elsewhere.iterdir()) == []


# Weights in memory, and constants


def test_weights_in_memory_leave_the_models_data_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch exporter names data `model.onnx.data`, which is what weights in memory would be written to."""
    path = base.with_name("torch.onnx")
    onnx.save(NET.proto(), path, save_as_external_data=True, location="torch.onnx.data", size_threshold=4000)
    before = (base.parent / "torch.onnx.data").read_bytes()
    model = graph.load(path)
    monkeypatch.setattr(writing, "PROTOBUF_LIMIT", 100)
    monkeypatch.setattr(writing, "SHAPE_BYTES", 100)
    graph.save(model, path)
    assert (base.parent / "torch.onnx.data").read_bytes() == before
    assert (base.parent / "torch.onnx.2.data").is_file()
    assert graph.fingerprint(graph.load(path)) == graph.fingerprint(NET.model())


def with_constant(folder: Path, location: str | None) -> Path:
    """The net with one more output, a Constant of four numbers: in the file, or in a data file."""
    proto = NET.proto()
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "numbers")
    path = folder / "model.onnx"
    if location is not None:
        (folder / location).write_bytes(b"head" + tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "4", "length": "16"}.items():
            tensor.external_data.add(key=key, value=value)
    proto.graph.node.append(helper.make_node("Constant", [], ["numbers"], name="node/numbers", value=tensor))
    proto.graph.output.append(helper.make_tensor_value_info("numbers", TensorProto.FLOAT, [4]))
    path.write_bytes(proto.SerializeToString())
    return path


def test_data_of_constants_comes_along(tmp_path: Path, elsewhere: Path) -> None:
    model = graph.load(with_constant(tmp_path, "numbers.data"))
    graph.save(model, elsewhere / "model.onnx")
    assert files(elsewhere) == {"model.onnx", "numbers.data"}
    again = graph.load(elsewhere / "model.onnx")
    assert graph.external_folder(again) == elsewhere.resolve()
    node = next(node for node in again.graph if node.name == "node/numbers")
    assert node.attributes["value"].as_tensor().numpy().tolist() == [0, 1, 2, 3]
    assert graph.infer_shapes(again)["numbers"] == (4,)


def test_fingerprints_of_constants_do_not_depend_on_storage(tmp_path: Path, elsewhere: Path) -> None:
    inside = graph.fingerprint(graph.load(with_constant(elsewhere, None)))
    assert graph.fingerprint(graph.load(with_constant(tmp_path, "numbers.data"))) == inside
    (tmp_path / "numbers.data").write_bytes(bytes(20))
    assert graph.fingerprint(graph.load(tmp_path / "model.onnx")) != inside


# Reading


@pytest.mark.parametrize(
    "kind", [np.float32, np.float16, np.int64, np.bool_, ir.DataType.BFLOAT16.numpy(), ir.DataType.INT4.numpy()]
)
def test_types_that_weights_have(tmp_path: Path, kind: np.dtype) -> None:
    array = np.arange(5).astype(kind)
    written = ir.tensor(array, name="w")
    (tmp_path / "w.data").write_bytes(b"123" + written.tobytes())
    outside = ir.ExternalTensor(
        "w.data", 3, written.nbytes, written.dtype, shape=ir.Shape([5]), name="w", base_dir=tmp_path
    )
    read = external.stored(outside)
    assert read.numpy().dtype == array.dtype
    assert same_bits(read.numpy(), array)
    assert same_bits(np.asarray(read), array)
    assert read.tobytes() == written.tobytes()


def _cut(data: Path) -> None:
    os.truncate(data, 10)


def _replaced(data: Path) -> None:
    data.rename(data.parent.parent / "moved")
    data.symlink_to("../moved")


@pytest.mark.parametrize("change", [Path.unlink, _cut, _replaced])
def test_data_that_changes_after_loading(base: Path, change: Callable[[Path], None]) -> None:
    """Checked again at each read: a file that was a file of the model's folder may be a link by now."""
    model = graph.load(base)
    change(base.parent / "weights.data")
    with pytest.raises(ModelFileError, match="external data of"):
        graph.weights(model)["layer0/o"].numpy()
    with pytest.raises(ModelFileError, match="external data of"):
        graph.fingerprint(model)
