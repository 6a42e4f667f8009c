"""What a fit refuses, and how it says so."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from planted import QUICK, Planted

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import (
    DebugSetError,
    FitError,
    NoSiteError,
    RunError,
)
from atpatch_onnx.fitting import preparation
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.matching import find_sites


def test_too_few_pairs():
    planted = Planted()
    with pytest.raises(DebugSetError, match=r"at least 100 pairs to calibrate a clean flag rate of 0\.01; found 50 of"):
        fit(planted.model(), planted.debug(200))


def test_pairs_without_an_effect():
    planted = Planted()
    inputs, labels, _ = planted.inputs(400)
    changed = {"x": inputs["x"].copy()}
    changed["x"][:, :, -1] += 1
    with pytest.raises(DebugSetError, match="the same prediction on both sides of all 400 pairs"):
        fit(planted.model(), DebugSet.from_pairs(inputs, changed, labels))


@pytest.mark.parametrize("wrong", ["labels", "target"])
def test_classes_that_the_model_does_not_have(wrong):
    planted = Planted()
    debug = planted.debug()
    debug = replace(debug, labels=debug.labels + 3) if wrong == "labels" else debug.with_target(9)
    with pytest.raises(DebugSetError, match=f"the {wrong} of the debug set: expected classes of the model, 0 to 2"):
        fit(planted.model(), debug, QUICK)


def spoiled(**changes) -> DebugSet:
    debug = Planted().debug()
    return DebugSet.from_pairs(
        *(
            {
                changes.get("name", "x"): side["x"].astype(changes.get("dtype", np.float32))[
                    :, : changes.get("tokens", 8)
                ]
            }
            for side in (debug.clean, debug.counterfactual)
        ),
        debug.labels,
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "pixels"}, "missing: 'x'"),
        ({"dtype": np.float64}, "expected dtype float32; found dtype float64"),
        ({"tokens": 7}, r"expected shape \[batch, 8, 12\]; found shape \[480, 7, 12\]"),
    ],
)
def test_inputs_that_do_not_fit_the_model(changes, text):
    with pytest.raises(DebugSetError, match=text):
        fit(Planted().model(), spoiled(**changes))


def test_nan_is_refused_before_there_is_a_debug_set():
    planted = Planted()
    inputs, labels, positions = planted.inputs(20)
    changed = planted.changed(inputs, positions)
    changed["x"][3, 2, 1] = np.nan
    with pytest.raises(DebugSetError, match=r"NaN|nan|finite"):
        DebugSet.from_pairs(inputs, changed, labels)


@pytest.mark.parametrize("sites", [("layer9.attention",), ("layer1.attention", "no"), ()])
def test_unknown_sites(sites):
    with pytest.raises(NoSiteError, match=r"layer0\.attention, layer1\.attention, layer2\.attention"):
        fit(Planted().model(), Planted().debug(), FitOptions(sites=sites))


def test_sites_of_two_token_axes_are_refused(monkeypatch):
    """Flags are carried along one token axis: sites of another would silently be left out."""
    names = Planted().sites

    def other_axis(model):
        first, *others = find_sites(model)
        return (first, *(replace(site, token_axis="elsewhere") for site in others))

    monkeypatch.setattr(preparation, "find_sites", other_axis)
    with pytest.raises(FitError, match="sites of one token axis") as raised:
        fit(Planted().model(), Planted().debug(), FitOptions(sites=names[:2]))
    assert "elsewhere" in raised.value.found


def test_a_model_without_attention():
    value = ir.Value(name="x", shape=ir.Shape(["n", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Identity", [value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=10)
    with pytest.raises(NoSiteError, match="found none that can be patched"):
        fit(model, Planted().debug())


def test_an_output_that_does_not_exist():
    with pytest.raises(RunError, match="an output named 'scores'; found logits"):
        fit(Planted().model(), Planted().debug(), FitOptions(output="scores"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"detectors": ()}, "option detectors"),
        ({"detectors": ("linear", "linear")}, "option detectors"),
        ({"detectors": ("linear", "deep")}, "option detectors: expected some of 'linear' and 'hidden', each once"),
        ({"thresholds": "highest"}, "option thresholds: expected 'balanced' or 'lowest'; found 'highest'"),
        ({"redistribute": "some"}, "option redistribute: expected 'needed' or 'all'; found 'some'"),
        ({"batch_size": 0}, "option batch_size"),
    ],
)
def test_options_that_mean_nothing(options, text):
    with pytest.raises(FitError, match=text):
        FitOptions(**options)
