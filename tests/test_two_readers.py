"""Files that onnxruntime would run as something else than what is read here."""

import os
import time

import numpy as np
import onnx
import pytest
from models import Net
from planted import Planted, fitted
from test_patched_session import answers, changed, inputs

import atpatch_onnx as atp
from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.files import write_whole


def test_weights_that_are_packed_beforehand(tmp_path):
    """onnxruntime runs what lies there in place of the weight: a backdoor that no fingerprint sees."""
    proto = Planted().proto()
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=200)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    tensor = next(one for one in proto.graph.initializer if one.external_data)
    entry = tensor.external_data.add()
    entry.key, entry.value = "prepacked_0", "MatMul+1|0;64;"
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match="the entry 'prepacked_0'"):
        atp.load(tmp_path / "model.onnx")


@pytest.mark.parametrize("location", ["*/_ORT_MEM_ADDR_/", "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*"])
def test_addresses_in_memory(location, tmp_path):
    proto = Net(tokens=4).proto()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    (tmp_path / "*").mkdir()
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match="inside the model's folder"):
        atp.load(tmp_path / "model.onnx")


def test_a_file_in_onnxruntimes_own_format(tmp_path):
    """The first bytes are an IR version and a doc string to one reader, a root and a mark to the other."""
    whole = b"\x08\x0a\x32\x04ORTM" + Net(tokens=4).proto().SerializeToString()
    assert onnx.load_model_from_string(whole).graph.node
    for name, content in (("model.onnx", whole), ("model.ort", Net(tokens=4).proto().SerializeToString())):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFileError, match="its own format"):
            atp.load(tmp_path / name)


def test_bytes_that_are_passed_over(tmp_path):
    """Of a field that stands twice, readers keep the last, and nobody looks at the first."""
    whole = b"\x32\x04\xff\xfe\xfd\xfc" + Net(tokens=4).proto().SerializeToString() + b"\x32\x00"
    (tmp_path / "model.onnx").write_bytes(whole)
    with pytest.raises(ModelFileError, match="bytes that readers pass over"):
        atp.load(tmp_path / "model.onnx")


def test_a_threshold_of_zero_can_be_exchanged(tmp_path):
    """Optimizers drop the subtraction of a zero, and with it what a session would set."""
    patch = changed(fitted(Planted()), {"threshold": 0.0})
    atp.save(atp.bake(Planted().model(), patch), tmp_path / "patched.onnx")
    assert atp.verify(Planted().model(), tmp_path / "patched.onnx", patch=patch).passed
    session = atp.PatchedSession(tmp_path / "patched.onnx")
    session.swap(fitted(Planted()))
    session.disable("layer1.attention")
    assert np.frombuffer(answers(session, inputs())[1], bool).sum() == 0


def test_a_folder_of_the_users_own_stays(tmp_path):
    (tmp_path / ".atpatch-backup").mkdir()
    (tmp_path / ".atpatch-backup" / "model").touch()
    os.utime(tmp_path / ".atpatch-backup", (time.time() - 3600,) * 2)
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / ".atpatch-backup" / "model").exists()
