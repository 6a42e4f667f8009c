"""Old files: lifted where every bit stays, else refused with what to do."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dressed import of_opset
from onnx import parser
from planted import Planted

import atpatch_onnx as atp
from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.graph import load as as_it_is
from atpatch_onnx.running.bits import same_bits
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.sessions import Session

AXES_AS_ATTRIBUTES = """<ir_version: %d, opset_import: ["" : %d]>
g (float[b, 5, 8] x%s) => (float[b, 8] y) <float[8, 24] w = {%s}> {
    qkv = MatMul (x, w)
    q, k, v = Split <axis = 2, split = [8, 8, 8]> (qkv)
    q4 = Unsqueeze <axes = [1]> (q)
    k4 = Unsqueeze <axes = [1]> (k)
    v4 = Unsqueeze <axes = [1]> (v)
    kt = Transpose <perm = [0, 1, 3, 2]> (k4)
    s = MatMul (q4, kt)
    p = Softmax <axis = 3> (s)
    y4 = MatMul (p, v4)
    y3 = Squeeze <axes = [1]> (y4)
    y = ReduceSum <axes = [1], keepdims = 0> (y3)
}"""


def with_attributes(opset: int, ir_version: int) -> onnx.ModelProto:
    """Packed QKV, as exporters wrote it before axes became inputs."""
    numbers = ", ".join(f"{number:.3f}" for number in np.random.default_rng(0).normal(scale=0.3, size=192))
    listed = ", float[8, 24] w" if ir_version < 4 else ""
    return parser.parse_model(AXES_AS_ATTRIBUTES % (ir_version, opset, listed, numbers))


OLD = {
    "opset 9": lambda: with_attributes(9, 4),
    "opset 11": lambda: with_attributes(11, 6),
    "opset 12": lambda: with_attributes(12, 7),
    "opset 12, masks by hand": lambda: of_opset(Planted().proto(), 12, 7),
    "opset 11, free": lambda: of_opset(Planted(free=True).proto(), 11, 6),
    "opset 11, IR version 3": lambda: with_attributes(11, 3),
    "opset 12, IR version 3": lambda: of_opset(Planted().proto(), 12, 3, listed=True),
    "opset 13, IR version 3": lambda: of_opset(Planted().proto(), 13, 3, listed=True),
    "opset 17, IR version 3": lambda: of_opset(Planted(masked=True).proto(), 17, 3, listed=True),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_file_is_lifted(name, tmp_path):
    onnx.save(OLD[name](), tmp_path / "old.onnx")
    model = atp.load(tmp_path / "old.onnx")
    assert model.graph.opset_imports[""] >= 13
    assert model.ir_version >= 4
    assert all(value.name not in model.graph.initializers for value in model.graph.inputs)
    assert all(site.self_attention for site in atp.find_sites(model))
    feed = draw_inputs(model, np.random.default_rng(1), samples=3)
    for optimize in (False, True):
        before, after = (Session(one, optimize=optimize).run(feed) for one in (tmp_path / "old.onnx", model))
        assert all(same_bits(before[output], after[output]) for output in before)
    assert atp.rehearse(tmp_path / "old.onnx").passed
    assert fingerprint(atp.load(tmp_path / "old.onnx")) == fingerprint(model), "the same each time"


def test_weights_stay_where_they_are(tmp_path):
    """Data files are neither read nor written to lift a graph."""
    proto = of_opset(Planted(layers=2).proto(), 12, 7)
    onnx.save(proto, tmp_path / "old.onnx", save_as_external_data=True, location="data", size_threshold=200)
    model = atp.load(tmp_path / "old.onnx")
    assert model.graph.opset_imports[""] == 13
    weights = model.graph.initializers.values()
    assert all(isinstance(one.const_value, ir.ExternalTensor) == (one.const_value.nbytes >= 200) for one in weights)
    atp.save(model, tmp_path / "lifted.onnx")
    feed = draw_inputs(model, np.random.default_rng(0))
    found = [Session(tmp_path / f"{name}.onnx").run(feed)["logits"] for name in ("old", "lifted")]
    assert same_bits(*found)


def test_later_files_are_left_as_they_are(tmp_path):
    onnx.save(of_opset(Planted().proto(), 13, 7), tmp_path / "model.onnx")
    assert fingerprint(atp.load(tmp_path / "model.onnx")) == fingerprint(as_it_is(tmp_path / "model.onnx"))


def test_what_cannot_be_lifted_says_what_to_do(tmp_path):
    """No input can be drawn where no shape is declared, so that nobody knows whether the bits are the same."""
    proto = with_attributes(11, 6)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "old.onnx")
    model = atp.load(tmp_path / "old.onnx")
    found = atp.explain(model)
    assert found.sites == ()
    assert [miss.reason for miss in found.near_misses] == [
        "attention, but the model has opset 11: load lifts old files where that keeps every bit of drawn inputs; where "
        "it does not, export the model again, at opset 17 or later"
    ]
    patch = atp.Patch(fingerprint(model), ())
    with pytest.raises(BakeError, match=r"opset 13 or later.*found opset 11.*export the model again, at opset 17"):
        atp.bake(model, patch)


def test_an_old_file_in_memory_is_refused_before_anything_is_done():
    model = ir.from_proto(of_opset(Planted().proto(), 17, 3, listed=True))
    with pytest.raises(BakeError, match=r"IR version 4 or later; found opset 17, IR version 3\. Read it with load"):
        atp.bake(model, atp.Patch(fingerprint(model), ()))
