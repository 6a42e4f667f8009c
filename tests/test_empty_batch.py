"""A batch of no sample runs in the patched file wherever it runs in the base, with shapes to match.

onnxruntime ends the process at an Einsum of nothing; so these forms are left out.
"""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dressed import sequence_first, with_a_sequence
from form_nets import FORMS as NETS
from models import FORMS, Net, draw_patch
from onnx import parser
from planted import Planted

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.errors import RunError
from atpatch_onnx.graph.names import FLAGGED, SCORE, flags_name
from atpatch_onnx.matching import batching, find_sites
from atpatch_onnx.running.bits import same_bits
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.sessions import Session

FOLDED = """<ir_version: 10, opset_import: ["" : 18]>
g (float[b, t, 8] x) => (float[b, t, 8] y) <float[8, 8] q, float[8, 8] k, float[8, 8] v> {
    rows = Constant <value_ints = [-1, 8]> ()
    flat = Reshape (x, rows)
    fq = Gemm (flat, q)
    fk = Gemm (flat, k)
    fv = Gemm (flat, v)
    sizes = Shape (x)
    q3 = Reshape (fq, sizes)
    k3 = Reshape (fk, sizes)
    v3 = Reshape (fv, sizes)
    kt = Transpose <perm = [0, 2, 1]> (k3)
    s = MatMul (q3, kt)
    p = Softmax <axis = -1> (s)
    z = MatMul (p, v3)
    y = Reshape (z, sizes)
}"""
"""Samples and tokens on one axis, their numbers free."""


def folded() -> ir.Model:
    model = parser.parse_model(FOLDED)
    del model.graph.initializer[:]
    rng = np.random.default_rng(0)
    for name in "qkv":
        array = rng.normal(scale=0.4, size=(8, 8)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(model)


MODELS = {
    **{name: lambda form=form: form.model("batch") for name, form in NETS.items() if "Einsum" not in name},
    "free": lambda: Net().model(),
    "free, a bias": lambda: Net(bias=True).model(),
    "free, half": lambda: Net(half=True).model(),
    "free, op": lambda: Net(form="attention", opset=23).model(),
    "free, packed op": lambda: Net(form="packed", opset=24).model(),
    "behind a cache": lambda: Net(form="attention", opset=23, past=3).model(),
    "masked": lambda: Planted(masked=True, free=True).model(),
    "sequence first": lambda: ir.from_proto(sequence_first(Planted(free=True).proto())),
    "a sequence returned": lambda: ir.from_proto(with_a_sequence(Planted().proto())),
    "folded": folded,
}


def without_samples(model: ir.Model) -> dict[str, np.ndarray]:
    where = batching(model)
    drawn = where.samples_first(draw_inputs(model, np.random.default_rng(0), batching=where))
    return where.given({name: array[:0] for name, array in drawn.items()})


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_sample(name, optimize):
    model = MODELS[name]()
    feed = without_samples(model)
    base = outcome(model, feed, optimize)
    if base is None:
        assert name in ("free, op", "free, packed op", "behind a cache"), "operators that refuse it by themselves"
        return
    for conditional in FORMS:
        patch = draw_patch(model, kind="linear" if conditional else "hidden")
        found = outcome(bake(model, patch, conditional=conditional, site_flags=True), feed, optimize)
        assert found is not None
        assert all(same_bits(array, found[output]) for output, array in base.items())
        assert found[FLAGGED].shape == found[SCORE].shape == (0, 1)
        assert all(len(found[flags_name(site.name)]) == 0 for site in find_sites(model))


def test_folded_forms_hold_for_samples_too():
    """The sizes that are computed for no sample are those of any number."""
    model = folded()
    feed = {"x": np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)}
    found = Session(bake(model, draw_patch(model), site_flags=True)).run(feed)
    assert found["atpatch/site_0/flags"].shape == (3, 6)
    assert same_bits(found["y"], Session(model).run(feed)["y"])


def outcome(model: ir.Model, feed: dict[str, np.ndarray], optimize: bool) -> dict[str, np.ndarray] | None:
    try:
        return Session(model, optimize=optimize).run(feed)
    except RunError:
        return None
