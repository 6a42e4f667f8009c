"""On which axis the samples are: found by what attention does with each, never by how many there are."""

import io

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from dressed import sequence_first, without_batch
from exports import export_module
from onnx import TensorProto, helper
from planted import Planted
from torch import nn

import atpatch_onnx as atp
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError
from atpatch_onnx.fitting.collect import find_suspects, input_specs
from atpatch_onnx.matching import batching, find_sites
from atpatch_onnx.running.batching import Batching

SQUARE = Planted(batch=8, tokens=8)


@pytest.mark.parametrize(
    ("proto", "inputs", "outputs"),
    [
        (Planted().proto(), {"x": 0}, {"logits": 0}),
        (Planted(masked=True, free=True).proto(), {"x": 0, "mask": 0}, {"logits": 0}),
        (sequence_first(Planted().proto()), {"x": 1}, {"logits": 0}),
        (sequence_first(SQUARE.proto()), {"x": 1}, {"logits": 0}),
        (sequence_first(Planted(masked=True, form="packed").proto()), {"x": 1, "mask": 0}, {"logits": 0}),
        (sequence_first(Planted(form="attention", free=True).proto()), {"x": 1}, {"logits": 0}),
        (without_batch(Planted().proto()), {"x": None}, {"logits": None}),
        (without_batch(Planted(free=True).proto(), keeps_one=True), {"x": None}, {"logits": 0}),
    ],
)
def test_the_axis_is_found(proto, inputs, outputs):
    assert batching(ir.from_proto(proto)) == Batching(inputs, outputs)


class Encoder(nn.Module):
    """torch's own encoder at its default, sequence first, handing out every token."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0), 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(ids), src_key_padding_mask=mask)


def scripted(module: nn.Module, inputs: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """By TorchScript, which writes the length of the example into the graph, whatever axes are declared free."""
    file, axes = io.BytesIO(), {"ids": {0: "tokens", 1: "batch"}, "mask": {0: "batch", 1: "tokens"}}
    how = {"dynamo": False, "opset_version": 17, "input_names": [*inputs], "dynamic_axes": axes}
    torch.onnx.export(module, tuple(inputs.values()), file, **how)
    return onnx.load_from_string(file.getvalue())


def captured(module: nn.Module, inputs: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """By dynamo, all sizes those of the example."""
    return torch.onnx.export(module, tuple(inputs.values()), dynamo=True, input_names=[*inputs]).model_proto


@pytest.mark.parametrize("exporter", [scripted, captured])
def test_torch_has_the_sequence_first(exporter):
    ids = torch.arange(21).reshape(7, 3)
    model = export_module(Encoder().eval(), {"ids": ids, "mask": torch.zeros(3, 7, dtype=torch.bool)}, exporter)
    found = batching(model)
    assert found.inputs == {"ids": 1, "mask": 0}
    assert [*found.outputs.values()] == [1]
    assert [(site.parts, site.keys, site.self_attention) for site in find_sites(model)] == [(1, 7, True)] * 2
    assert atp.rehearse(model, {"ids": ids.numpy(), "mask": np.zeros((3, 7), bool)}).passed  # of padding: none


def test_suspects_are_those_of_the_same_samples():
    """As many tokens as samples: transposed, each token would be taken for a sample."""
    debug, plain = SQUARE.debug(40), SQUARE.model()
    turned = ir.from_proto(sequence_first(SQUARE.proto()))
    found = [find_suspects(model, find_sites(model), debug).suspects for model in (plain, turned)]
    assert np.array_equal(found[0], found[1])
    assert found[0].any()


def test_a_debug_set_is_given_samples_first():
    specs = input_specs(ir.from_proto(sequence_first(Planted(tokens=6).proto())))
    assert specs["x"].shape == ("batch", 6, Planted().width)
    assert input_specs(ir.from_proto(without_batch(Planted(tokens=6).proto())))["x"].shape == (None, 6, Planted().width)
    debug = Planted(tokens=6).debug(20)
    debug.check_inputs(specs)
    turned = [{"x": np.moveaxis(side["x"], 0, 1)} for side in (debug.clean, debug.counterfactual)]
    with pytest.raises(DebugSetError, match="shape"):
        DebugSet.from_pairs(*turned).check_inputs(specs)


def test_a_mask_for_all_samples_is_no_batch():
    """One sample at a time, each with a mask: the model takes one for all."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[b, 4, 8] x, float[4, 4] mask) => (float[b, 4, 8] y) {
        t = Transpose <perm = [0, 2, 1]> (x)
        s = MatMul (x, t)
        m = Add (s, mask)
        p = Softmax <axis = -1> (m)
        y = MatMul (p, x)
    }"""
    found = batching(ir.from_proto(onnx.parser.parse_model(text)))
    assert found.inputs == {"x": 0, "mask": None}
    assert found.one_by_one


def test_where_nothing_is_told_samples_are_first():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert batching(ir.from_proto(proto)) == Batching({"x": 0}, {"y": 0})
