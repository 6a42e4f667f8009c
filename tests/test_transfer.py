"""One patch serves every export of a model: the same detectors and neutral tokens, the same flags."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exports import MODELS, WAYS, export, export_module, numpy_inputs
from models import Net, draw_patch, fire_on_some, run, same_bits
from planted import Planted, fitted
from test_edits import edit, patch_of

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.transfer import transfer
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import find_sites

FROM = {
    "vit": ("dynamo 18 eager", ("dynamo 23 sdpa", "torchscript eager", "transformers")),
    "bert": ("dynamo 18 sdpa", ("torchscript eager",)),
    "gpt2": ("dynamo 18 eager", ("torchscript sdpa",)),
    "llama": ("dynamo 23 sdpa", ("torchscript eager", "transformers dynamic")),
}
"""Of each model: the export that a patch is drawn for, and those that it is carried to."""

CASES = [(name, way, to) for name, (way, others) in FROM.items() for to in others]


def feed_of(model: ir.Model, name: str) -> dict[str, np.ndarray]:
    wanted = {value.name for value in model.graph.inputs}
    return {key: array for key, array in numpy_inputs(name).items() if key in wanted}


def flags(outputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [array for name, array in outputs.items() if name.endswith("/flags")]


@pytest.mark.parametrize("kind", ["linear", "hidden"])
@pytest.mark.parametrize(("name", "way", "to"), CASES, ids=["-".join(case).replace(" ", "_") for case in CASES])
def test_a_patch_does_the_same_in_every_export(name: str, way: str, to: str, kind: str) -> None:
    base, other = export(name, way), export(name, to)
    patch = fire_on_some(base, draw_patch(base, kind=kind), feed_of(base, name), share=0.1)
    carried = transfer(patch, base, other)
    assert carried.base == fingerprint(other)
    assert [entry.site for entry in carried.sites] == [site.name for site in find_sites(other)]
    for ours, theirs in zip(patch.sites, carried.sites, strict=True):
        assert same_bits(ours.detector.weights, theirs.detector.weights)
        assert same_bits(ours.neutral.key, theirs.neutral.key)
    before, after = (
        run(bake(model, one, site_flags=True), feed_of(model, name)) for model, one in ((base, patch), (other, carried))
    )
    assert len(flags(before)) == len(patch.sites)
    for ours, theirs in zip(flags(before), flags(after), strict=True):
        assert 0 < ours.mean() < 1
        assert np.array_equal(ours, theirs)
    untouched = (run(model, feed_of(model, name)) for model in (base, other))
    first, second = (next(iter(outputs.values())) for outputs in untouched)
    ours, theirs = (next(iter(outputs.values())) for outputs in (before, after))
    assert np.abs(ours - first).max() > 1e-3, "the patch does something"
    # the exports' own rounding in float32, of logits and states of the size of one
    np.testing.assert_allclose(second, first, atol=1e-5)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_a_fitted_patch_repairs_another_form_of_its_model() -> None:
    planted, fused = Planted(), Planted(form="attention")
    model = fused.model()
    patch = transfer(fitted(planted), planted.model(), model)
    unseen = planted.debug(200, seed=9)
    before, after = run(model, unseen.counterfactual), run(bake(model, patch), unseen.counterfactual)
    assert (before["logits"].argmax(axis=1) == planted.target).mean() > 0.95
    assert (after["logits"].argmax(axis=1) == planted.target).mean() < 0.01


def test_a_half_precision_export_is_of_the_same_model() -> None:
    base, half = Net(seed=3), Net(seed=3, half=True)
    model = half.model()
    whole = base.model()
    for name, value in whole.graph.initializers.items():
        tensor = value.const_value.numpy()
        if tensor.dtype == np.float32:  # float16 is rounded from float32 as an exporter would
            rounded = ir.tensor(tensor.astype(np.float16), name=name)
            model.graph.initializers[name].const_value = rounded
    assert transfer(draw_patch(whole), whole, model).base == fingerprint(model)


def other_weights(name: str, way: str) -> ir.Model:
    torch.manual_seed(1)
    attention, exporter = WAYS[way]
    return export_module(MODELS[name].build(attention).eval(), MODELS[name].inputs, exporter)


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_another_model_of_the_same_shape_is_told_by_its_projections(name: str) -> None:
    way = FROM[name][0]
    base = export(name, way)
    with pytest.raises(PatchMismatchError, match="the weights that project keys at") as raised:
        transfer(draw_patch(base), base, other_weights(name, way))
    assert raised.value.where.endswith("of the other model")


def changed(net: Net, name: str, change: float) -> ir.Model:
    model = net.model()
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() + np.float32(change), name=name)
    return model


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize(("letter", "which"), [("k", "keys"), ("v", "values")])
def test_one_weight_is_enough_to_tell_another_model(what: str, letter: str, which: str) -> None:
    net = Net()
    base = net.model()
    other = changed(net, f"layer1/{letter}/{what}", 1e-3)
    with pytest.raises(PatchMismatchError, match=f"the weights that project {which} at"):
        transfer(draw_patch(base), base, other)
    assert transfer(draw_patch(base), base, changed(net, "layer1/o", 1e-3))  # not a projection of keys or values


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Net(layers=3), "expected 2 attention sites, as the base has; found 3"),
        (Net(heads=4, kv_heads=4, depth=2), "expected keys of 2 heads of depth 4, .*; found 4 heads of depth 2"),
        (Net(heads=2, kv_heads=1), "expected keys of 2 heads of depth 4, .*; found 1 heads of depth 4"),
    ],
    ids=["sites", "depth", "shared"],
)
def test_other_sites_are_refused(other: Net, reason: str) -> None:
    base = Net().model()
    with pytest.raises(PatchMismatchError, match=reason):
        transfer(draw_patch(base), base, other.model())


def test_a_patch_of_another_model_is_refused() -> None:
    base, other = Net().model(), Net(form="attention", opset=23).model()
    with pytest.raises(PatchMismatchError, match="expected the model that the patch was fitted on"):
        transfer(draw_patch(other), base, other)
    patch = draw_patch(base)
    strange = replace(patch, sites=(replace(patch.sites[0], site="elsewhere"), *patch.sites[1:]))
    with pytest.raises(PatchMismatchError, match="expected the attention site 'elsewhere'"):
        transfer(strange, base, other)


def test_edits_of_hidden_units_are_not_carried() -> None:
    net = Net(mlp=5)
    base = net.model()
    edits = patch_of(net, edit("hidden_0", 0)).edits
    for patch in (replace(draw_patch(base), edits=edits), replace(draw_patch(base), after=("0123456789abcdef",))):
        with pytest.raises(PatchMismatchError, match="expected a patch of the attention alone"):
            transfer(patch, base, base)
