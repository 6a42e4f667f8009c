"""The probing graph: without edits it is the base, with edits it is what gets baked."""

import numpy as np
import pytest
from models import run, same_bits
from test_neurons_nets import GUILTY, NETS, Guilty, ids, nets

from atpatch_onnx.baking.edits import edited
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.neurons import NeuronTrial, Unit, edits_of
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.sessions import Session

UNITS = [Unit(1, 7), Unit(0, 3), Unit(1, 2)]
FACTOR, CONSTANT = [0.0, 2.5, -1.0], [1.5, 0.0, 0.25]


@nets
def test_without_edits_it_is_the_base(net):
    model = net.model()
    inputs, _, _ = net.inputs(10)
    logits = NeuronTrial(model, net.layers(), "logits").run(inputs)
    assert same_bits(logits, Session(model).collect(inputs, ["logits"])["logits"])


@nets
def test_with_edits_it_is_what_is_baked(net):
    """The search tries exactly what will be served."""
    model = net.model()
    inputs, _, _ = net.inputs(10)
    edits = edits_of(net.layers(), UNITS, FACTOR, CONSTANT)
    logits = NeuronTrial(model, net.layers(), "logits").run(inputs, edits)
    baked = Session(edited(model, edits)).collect(inputs, ["logits"])["logits"]
    # an optimizer may fold a constant that is an input in the other graph
    np.testing.assert_allclose(logits, baked, rtol=1e-5, atol=1e-5)
    assert np.abs(logits - Session(model).collect(inputs, ["logits"])["logits"]).max() > 0.1


@pytest.mark.parametrize("net", [net for net in NETS if not net.masked and net.batch != 4], ids=ids)
def test_a_unit_with_factor_0_is_set_to_its_constant(net):
    inputs, _, _ = net.inputs(10)
    trial = NeuronTrial(net.model(), net.layers(), "logits")
    logits = trial.run(inputs, edits_of(net.layers(), [GUILTY], 0.0, 0.75), batch_size=3)
    np.testing.assert_allclose(logits, net.numpy(inputs["x"], {GUILTY: 0.75}), rtol=1e-4, atol=1e-4)  # float32


def test_one_run_leaves_nothing_for_the_next():
    net = Guilty()
    inputs, _, _ = net.inputs(10)
    trial = NeuronTrial(net.model(), net.layers(), "logits")
    before = trial.run(inputs)
    trial.run(inputs, edits_of(net.layers(), UNITS, FACTOR, CONSTANT))
    assert same_bits(trial.run(inputs), before)


def test_the_base_is_left_as_it_is():
    model = Guilty().model()
    nodes = len(model.graph)
    NeuronTrial(model, Guilty().layers(), "logits")
    assert len(model.graph) == nodes
    assert run(model, Guilty().inputs(2)[0])["logits"].shape == (2, 3)


def test_a_layer_that_is_not_there_is_refused():
    net = Guilty()
    trial = NeuronTrial(net.model(), net.layers(), "logits")
    edit = LayerEdit("elsewhere", np.array([0]), np.ones(1, np.float32), np.ones(1, np.float32))
    with pytest.raises(PatchMismatchError, match="found elsewhere"):
        trial.run(net.inputs(2)[0], [edit])


def test_edits_are_in_the_order_of_the_graph():
    layers = Guilty().layers()
    first, second = edits_of(layers, UNITS, FACTOR, CONSTANT)
    assert (first.layer, second.layer) == (layers[0].name, layers[1].name)
    assert first.units.tolist() == [3]
    assert second.units.tolist() == [2, 7]
    assert second.factor.tolist() == [-1.0, 0.0]
    assert second.constant.tolist() == [0.25, 1.5]
    assert edits_of(layers, [], 0.0, 0.0) == ()
