"""Models in half precision stay in it, keep their bits where nothing is flagged, and are written without `If`."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import ALWAYS, Net, draw_patch, run, same_bits
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from atpatch_onnx import bake, find_sites, graph, unbake
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.measuring.inspect import site_values, value_names

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
def test_half_precision_is_branchless_unless_asked_otherwise(net: Net) -> None:
    model = net.model()
    patch = draw_patch(model)
    assert read_record(bake(model, patch)).emission == Emission.BRANCHLESS
    assert not any(node.op_type == "If" for node in bake(model, patch).graph.all_nodes())
    assert read_record(bake(model, patch, emission=Emission.CONDITIONAL)).emission == Emission.CONDITIONAL


@halves
@pytest.mark.parametrize("optimize", [True, False])
def test_float16_keeps_its_bits_where_nothing_is_flagged(net: Net, optimize: bool) -> None:
    """Inside an `If` it would not: the CPU's kernels hand Y on unrounded where no `If` and no move stands between."""
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    base = run(model, feed, optimize=optimize)
    patched = run(bake(model, draw_patch(model)), feed, optimize=optimize)
    for name, array in base.items():
        assert same_bits(patched[name], array)


@pytest.mark.parametrize("net", [NETS["softmax"], NETS["guarded, masked"]], ids=["softmax", "guarded, masked"])
@pytest.mark.parametrize("emission", Emission)
def test_bfloat16_stays_bfloat16(net: Net, emission: Emission) -> None:
    model = as_bfloat16(net.proto())
    sites = find_sites(model)
    assert [site.dtype for site in sites] == ["BFLOAT16"] * net.layers
    feed = {
        name: array.astype(ml_dtypes.bfloat16) if array.dtype == np.float16 else array
        for name, array in net.feed(np.random.default_rng(0)).items()
    }
    base = evaluate(model, feed)
    never = bake(model, draw_patch(model), emission=emission)
    found = evaluate(never, feed)
    for name, array in base.items():
        assert same_bits(found[name], array)

    fires = bake(model, draw_patch(model, threshold=ALWAYS), emission=emission)
    record = read_record(fires)
    seen = evaluate(expose(fires, [name for site in record.sites for name in value_names(site)]), feed)
    for site in record.sites:
        assert seen[site.output].dtype == ml_dtypes.bfloat16
        values = site_values(fires, site, seen)
        assert values.flags.any()
        # the result is rounded to 8 bits of precision
        np.testing.assert_allclose(values.corrected, values.reference(), rtol=2**-8, atol=1e-5)
    assert graph.fingerprint(unbake(fires)) == graph.fingerprint(model)
