"""Files for serving stacks: read back by Triton's own protobuf, and served by a small server of the same protocol."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from google.protobuf import text_format
from models import run
from planted import Planted, fitted
from tritonclient.grpc import model_config_pb2

import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.errors import AtPatchError, ServingError
from atpatch_onnx.serving import KServeOptions, TritonOptions, write_inference_service, write_model_repository
from atpatch_onnx.serving.triton import DTYPES, config_pbtxt


def patched(planted: Planted) -> ir.Model:
    return atp.bake(planted.model(), fitted(planted))


def parsed(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_triton_reads_what_was_written(tmp_path: Path) -> None:
    planted = Planted(masked=True, free=True, tokens=12)
    model = patched(planted)
    place = write_model_repository(model, tmp_path, "reviews", TritonOptions(max_batch_size=8, kind="cpu", instances=2))
    config = parsed((place / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("reviews", "onnxruntime", 8)
    inputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input}
    assert inputs == {
        "x": (model_config_pb2.TYPE_FP32, [-1, planted.width]),
        "mask": (model_config_pb2.TYPE_INT64, [-1]),
    }
    outputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.output}
    assert outputs == {
        "logits": (model_config_pb2.TYPE_FP32, [planted.classes]),
        "atpatch/flagged": (model_config_pb2.TYPE_BOOL, [1]),
        "atpatch/score": (model_config_pb2.TYPE_FP32, [1]),
    }
    assert config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 2)
    assert config.parameters["atpatch.patch"].string_value == fitted(planted).id
    served = atp.load(place / "1" / "model.onnx")
    inputs_of = planted.inputs(5)[0]
    assert np.array_equal(run(served, inputs_of)["logits"], run(model, inputs_of)["logits"])


def test_a_fixed_batch_is_not_batched() -> None:
    planted = Planted(batch=1)
    config = parsed(config_pbtxt(planted.model(), "one", TritonOptions()))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [1, planted.tokens, planted.width]
    assert not config.parameters  # a base carries no patch


def test_every_type_is_one_of_tritons() -> None:
    assert set(DTYPES.values()) <= set(model_config_pb2.DataType.keys())


def tensors(*, dtype: ir.DataType | None = ir.DataType.FLOAT, shape: list[int | str | None] | None) -> ir.Model:
    value = ir.Value(
        name='odd "name"\\',
        shape=None if shape is None else ir.Shape(shape),
        type=None if dtype is None else ir.TensorType(dtype),
    )
    return ir.Model(ir.Graph([value], [value], nodes=[], opset_imports={"": 18}, name="g"), ir_version=10)


def test_names_are_quoted_and_a_batch_of_numbers_is_reshaped() -> None:
    config = parsed(config_pbtxt(tensors(shape=["batch"]), "n", TritonOptions()))
    (tensor,) = config.input
    assert tensor.name == 'odd "name"\\'
    assert list(tensor.dims) == [1]
    assert tensor.HasField("reshape")
    assert not tensor.reshape.shape


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tensors(shape=None), "known type and number of axes"),
        (tensors(dtype=None, shape=["b"]), "known type and number of axes"),
        (tensors(dtype=ir.DataType.COMPLEX64, shape=["b"]), "a type that Triton knows; found COMPLEX64"),
    ],
    ids=["rank", "type", "complex"],
)
def test_tensors_that_no_server_can_declare(tmp_path: Path, model: ir.Model, expected: str) -> None:
    with pytest.raises(ServingError, match=expected):
        write_model_repository(model, tmp_path, "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "two words"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServingError, match="name"):
        write_model_repository(tensors(shape=["b", 3]), tmp_path / "repository", name)
    with pytest.raises(ServingError, match="name"):
        write_inference_service(tensors(shape=["b", 3]), tmp_path / "repository", name)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    write_model_repository(tensors(shape=["b", 3]), tmp_path, "m")
    before = (tmp_path / "m" / "config.pbtxt").read_text()
    with pytest.raises(ServingError, match="move that model away"):
        write_model_repository(tensors(shape=["b", 4]), tmp_path, "m")
    assert (tmp_path / "m" / "config.pbtxt").read_text() == before


def test_kserve_manifest(tmp_path: Path) -> None:
    planted = Planted()
    options = KServeOptions(storage="s3://bucket/models", cpu="4")
    file = write_inference_service(patched(planted), tmp_path, "sorter", options)
    manifest = yaml.safe_load(file.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert manifest["metadata"]["name"] == "sorter"
    assert manifest["metadata"]["annotations"]["atpatch/patch"] == fitted(planted).id
    model = manifest["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton"}
    assert (model["protocolVersion"], model["storageUri"]) == ("v2", "s3://bucket/models")
    assert model["resources"]["limits"] == {"cpu": "4", "memory": "4Gi"}
    assert parsed((tmp_path / "models" / "sorter" / "config.pbtxt").read_text()).name == "sorter"


@pytest.mark.parametrize("name", ["true", "null", "1", "no"])
def test_names_that_yaml_reads_as_something_else(name: str, tmp_path: Path) -> None:
    file = write_inference_service(patched(Planted()), tmp_path, name)
    assert yaml.safe_load(file.read_text())["metadata"]["name"] == name


def test_a_full_disk_leaves_no_half_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(AtPatchError, match="No space left"):
        write_model_repository(patched(Planted()), tmp_path, "sorter")
    assert list(tmp_path.iterdir()) == []


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fixed.onnx"
    atp.save(patched(Planted()), file)
    assert main(["serve-config", str(file), str(tmp_path / "repository"), "--stack", "triton", "--kind", "gpu"]) == 0
    config = parsed((tmp_path / "repository" / "fixed" / "config.pbtxt").read_text())
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert main(["serve-config", str(file), str(tmp_path / "k"), "--stack", "kserve", "--name", "Upper"]) == 1
    assert "a label of Kubernetes" in capsys.readouterr().err
