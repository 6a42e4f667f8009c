"""Maps that a model returns pass through: read, copied, patched and written, they are what they were."""

import numpy as np
import onnx
import pytest
from dressed import with_maps
from onnx import TensorProto, helper
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx import graph
from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.running.bits import same_bits
from atpatch_onnx.running.sessions import Session


@pytest.mark.parametrize("named", [True, False])
def test_a_map_is_what_it_was(named, tmp_path):
    proto = with_maps(Planted().proto(), named=named)
    onnx.save(proto, tmp_path / "base.onnx")
    model = atp.load(tmp_path / "base.onnx")
    written = onnx.load_model_from_string(graph.to_bytes(graph.copy(model)))
    assert [*written.graph.output] == [*proto.graph.output]
    assert atp.fingerprint(graph.copy(model)) == atp.fingerprint(model)
    feed = {"x": Planted().inputs(5)[0]["x"]}
    before, after = (Session(one).run(feed)["maps"] for one in (tmp_path / "base.onnx", model))
    assert [*before[0]] == (["c0", "c1", "c2"] if named else [0, 1, 2])
    assert same_bits(before, after)


def test_its_type_is_part_of_the_model(tmp_path):
    """An unbaked file with another type is another model."""
    found = []
    for named in (True, False):
        proto = with_maps(Planted().proto())
        proto.graph.output[1].CopyFrom(with_maps(Planted().proto(), named=named).graph.output[1])
        (tmp_path / "base.onnx").write_bytes(proto.SerializeToString())
        found.append(atp.fingerprint(atp.load(tmp_path / "base.onnx")))
    assert found[0] != found[1]


def test_a_patch_hands_the_base_maps_out(tmp_path):
    onnx.save(with_maps(Planted().proto()), tmp_path / "base.onnx")
    model = atp.load(tmp_path / "base.onnx")
    patch = atp.Patch(atp.fingerprint(model), fitted(Planted()).sites)
    atp.save(atp.bake(model, patch), tmp_path / "patched.onnx")
    inputs = Planted().inputs(6)[0]
    before, after = (Session(tmp_path / f"{name}.onnx").run(inputs)["maps"] for name in ("base", "patched"))
    assert same_bits(before, after)
    assert atp.fingerprint(atp.unbake(atp.load(tmp_path / "patched.onnx"))) == patch.base


def test_a_map_that_goes_in_is_refused(tmp_path):
    """Debug sets hold arrays, and so does all that is drawn."""
    proto = Planted().proto()
    kind = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    proto.graph.input.append(helper.make_value_info("row", kind))
    vector = {"string_vocabulary": ["a", "b"], "domain": "ai.onnx.ml", "name": "/row"}
    proto.graph.node.append(helper.make_node("DictVectorizer", ["row"], ["vector"], **vector))
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    (tmp_path / "base.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match=r"the value 'row' of the graph 'planted': .*found a map, which this"):
        atp.load(tmp_path / "base.onnx")


def test_a_sparse_weight_is_refused_with_its_reason(tmp_path):
    """In a branch as in the main graph: onnx-ir leaves it out."""
    values = helper.make_tensor("pruned", TensorProto.FLOAT, [1], [0.5])
    sparse = helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([3])), [4, 4])
    for inner in (False, True):
        proto = Planted().proto()
        target = proto.graph
        if inner:
            x = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
            branch = helper.make_graph([helper.make_node("Identity", ["logits"], ["z"])], "branch", [], [x])
            node = helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
            proto.graph.node.append(node)
            target = proto.graph.node[-1].attribute[0].g
        target.sparse_initializer.append(sparse)
        (tmp_path / "base.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(ModelFileError, match=r"found sparse initializers.*Store them as dense ones"):
            atp.load(tmp_path / "base.onnx")
