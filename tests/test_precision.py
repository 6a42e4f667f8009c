"""Models in half precision stay in it, and keep their bits: detectors alone compute in float32."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from driving import driven
from models import ALWAYS, FORMS, Net, draw_patch, fire_on_some, in_axes, run, same_bits
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from atpatch_onnx import bake, find_sites, graph, unbake
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record

NETS = {
    "softmax": Net(half=True),
    "guarded, masked": Net(form="guarded", half=True, bias=True),
    "grouped op": Net(opset=23, form="attention", heads=4, kv_heads=2, half=True),
    "packed op": Net(opset=23, form="packed", half=True),
}
halves = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


def as_bfloat16(proto: onnx.ModelProto) -> ir.Model:
    """The same model with bfloat16 where it has float16."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for tensor in changed.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            array = onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for info in (*changed.graph.input, *changed.graph.output, *changed.graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
            info.type.tensor_type.elem_type = TensorProto.BFLOAT16
    model = ir.from_proto(changed)
    assert isinstance(model, ir.Model)
    return model


def evaluate(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by onnx's reference implementation: no runtime here has bfloat16 kernels on the CPU."""
    session = ReferenceEvaluator(ir.to_proto(model))
    return dict(zip(session.output_names, session.run(None, feed), strict=True))


@halves
def test_weights_of_the_patch_have_the_type_of_what_they_meet(net: Net) -> None:
    """Neutral keys and values that of keys and values, a detector float32: thresholds lie between close scores."""
    model = net.model()
    found = {
        str(name).rpartition("/")[2]: value.dtype
        for name, value in bake(model, draw_patch(model, kind="hidden")).graph.initializers.items()
        if str(name).startswith("atpatch/site_")
    }
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    assert {name: kind for name, kind in found.items() if name.startswith("neutral_")} == {
        "neutral_key": half,
        "neutral_value": half,
    }
    names = ("detector", "detector_bias", "detector_output", "threshold", "level")
    assert {found[name] for name in names} == {single}


@halves
def test_half_precision_has_no_if_unless_asked_for_one(net: Net) -> None:
    model = net.model()
    patch = draw_patch(model)
    assert not read_record(bake(model, patch)).conditional
    assert not any(node.op_type == "If" for node in bake(model, patch).graph.all_nodes())
    assert read_record(bake(model, patch, conditional=True)).conditional


@halves
@pytest.mark.parametrize("optimize", [True, False])
def test_float16_keeps_its_bits_where_nothing_is_flagged(net: Net, optimize: bool) -> None:
    """Behind an `If` it may not: the CPU's kernels hand keys on unrounded where no `If` and no move stands between."""
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    base = run(model, feed, optimize=optimize)
    patched = run(bake(model, draw_patch(model)), feed, optimize=optimize)
    for name, array in base.items():
        assert same_bits(patched[name], array)


@halves
def test_float16_is_the_base_given_neutral_keys_and_values(net: Net) -> None:
    """Batch-mates without a flag keep their bits; so do all where keys are moved, and are rounded on the way."""
    model, feed = net.model(), net.feed(np.random.default_rng(0), 6)
    base = run(model, feed, optimize=False)
    patched = bake(model, fire_on_some(model, draw_patch(model), feed, share=0.05))
    found = run(patched, feed, optimize=False)
    flagged = found["atpatch/flagged"][:, 0]
    assert flagged.any()
    assert not flagged.all()
    for name, array in driven(model, patched, feed).items():
        assert same_bits(found[name][~flagged], base[name][~flagged])
        if net.form == "packed":  # keys and values are rounded where they are returned, and nowhere else
            np.testing.assert_allclose(found[name], array, rtol=2**-9, atol=2**-7)
        else:
            assert same_bits(found[name], array)


@pytest.mark.parametrize("net", [NETS["softmax"], NETS["guarded, masked"]], ids=["softmax", "guarded, masked"])
@pytest.mark.parametrize("conditional", FORMS)
def test_bfloat16_stays_bfloat16(net: Net, conditional: bool) -> None:
    model = as_bfloat16(net.proto())
    sites = find_sites(model)
    assert [site.dtype for site in sites] == ["BFLOAT16"] * net.layers
    feed = {
        name: array.astype(ml_dtypes.bfloat16) if array.dtype == np.float16 else array
        for name, array in net.feed(np.random.default_rng(0)).items()
    }
    base = evaluate(model, feed)
    never = bake(model, draw_patch(model), conditional=conditional)
    found = evaluate(never, feed)
    for name, array in base.items():
        assert same_bits(found[name], array)

    patch = draw_patch(model, threshold=ALWAYS)
    fires = bake(model, patch, conditional=conditional)
    seen = evaluate(expose(fires, [f"atpatch/{site.name}/{which}" for site in sites for which in WHICH]), feed)
    for site, entry in zip(sites, patch.sites, strict=True):
        assert entry.neutral is not None
        for which, place, neutral in zip(
            WHICH, (site.key, site.value), (entry.neutral.key, entry.neutral.value), strict=True
        ):
            found = in_axes(seen[f"atpatch/{site.name}/{which}"], place)
            expected = neutral.astype(ml_dtypes.bfloat16)[None, :, None]
            assert same_bits(found, np.ascontiguousarray(np.broadcast_to(expected, found.shape)))
    assert graph.fingerprint(unbake(fires)) == graph.fingerprint(model)


WHICH = ("key", "value")
