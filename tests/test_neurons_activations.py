"""Activations, streamed: what numpy says of all of them at once; padding tells nothing."""

from dataclasses import replace

import numpy as np
import pytest
from models import run, with_outputs
from test_neurons_nets import GUILTY, Guilty, ids

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.neurons import Unit, measure_activations, most_different

CASES = [
    Guilty(),
    Guilty(kind="attribute"),
    Guilty(flat=True),
    Guilty(masked=True),
    Guilty(masked=True, flat=True),
    Guilty(masked=True, batch=4),
    Guilty(masked=True, flat=True, batch=4),
    Guilty(flat=True, batch=4),
]


def all_activations(net: Guilty, inputs: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """`[samples, tokens, units]`, of all inputs at once."""
    free = replace(net, batch="batch").model()
    value = net.layers()[layer].value
    return run(with_outputs(free, [value]), inputs)[value].reshape(-1, net.tokens, net.units).astype(np.float64)


@pytest.mark.parametrize("net", CASES, ids=ids)
def test_they_are_numpys_own(net):
    debug = net.debug(21)  # no whole number of batches
    measured = measure_activations(net.model(), net.layers(), debug)
    counts = debug.clean["mask"] == 1 if net.masked else np.ones((21, net.tokens), bool)
    for number, layer in enumerate(measured):
        clean, other = (all_activations(net, side, number)[counts] for side in (debug.clean, debug.counterfactual))
        # the graphs' batches differ in size, which float32 products show
        near = {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(layer.mean, clean.mean(axis=0), **near)
        np.testing.assert_allclose(layer.low, clean.min(axis=0), **near)
        np.testing.assert_allclose(layer.high, clean.max(axis=0), **near)
        np.testing.assert_allclose(layer.low_of_both, np.minimum(clean, other).min(axis=0), **near)
        np.testing.assert_allclose(layer.high_of_both, np.maximum(clean, other).max(axis=0), **near)
        apart = np.abs(other - clean).mean(axis=0) / clean.std(axis=0)
        np.testing.assert_allclose(layer.difference, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_does_not_change_the_means(flat):
    net = Guilty(masked=True, flat=flat)
    debug = net.debug(20)
    measured = measure_activations(net.model(), net.layers(), debug)
    longer = replace(net, tokens=net.tokens + 3)
    rng = np.random.default_rng(0)

    def padded(side):
        x = rng.normal(scale=5, size=(20, longer.tokens, net.width)).astype(np.float32)
        x[:, : net.tokens] = side["x"]
        return {"x": x, "mask": np.pad(side["mask"], ((0, 0), (0, 3)))}

    pairs = DebugSet.from_pairs(padded(debug.clean), padded(debug.counterfactual), debug.labels)
    again = measure_activations(longer.model(), longer.layers(), pairs)
    for before, after in zip(measured, again, strict=True):
        for name in ("mean", "low", "high", "low_of_both", "high_of_both", "difference"):
            # sums of another number of rows
            np.testing.assert_allclose(getattr(after, name), getattr(before, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_the_guilty_unit_differs_most(kind):
    net = Guilty(kind=kind)
    measured = measure_activations(net.model(), net.layers(), net.debug(40))
    assert most_different(measured, 1) == (GUILTY,)


def test_a_unit_that_is_silent_on_clean_inputs_differs_most():
    """It has no standard deviation there."""
    net = Guilty(leak=0.0)
    measured = measure_activations(net.model(), net.layers(), net.debug(40))
    assert measured[1].low[7] == measured[1].high[7] == 0
    assert measured[1].high_of_both[7] == pytest.approx(3)
    assert np.isfinite(measured[1].difference).all()
    assert most_different(measured, 1) == (GUILTY,)


def test_every_unit_where_no_number_is_given():
    net = Guilty()
    measured = measure_activations(net.model(), net.layers(), net.debug(20))
    everyone = tuple(Unit(layer, unit) for layer in range(2) for unit in range(net.units))
    assert most_different(measured, None) == most_different(measured, 1000) == everyone
    few = most_different(measured, 4)
    assert len(few) == 4
    assert list(few) == sorted(few)
    assert GUILTY in few


def test_progress_is_told():
    told = []
    net = Guilty()
    debug = net.debug(20)
    measure_activations(net.model(), net.layers(), debug, progress=lambda *one: told.append(one), stage="looking")
    assert told == [("looking", 8, 20), ("looking", 16, 20), ("looking", 20, 20)]
