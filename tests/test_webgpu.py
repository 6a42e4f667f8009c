"""A patched model on onnxruntime-web's WebGPU provider, in headless Chromium with a software adapter, if it starts."""

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from models import draw_patch, fire_on_some, run
from onnx import TensorProto, helper
from planted import Planted

import atpatch_onnx as atp
from atpatch_onnx.graph.names import SITE_KEY
from samples import webgpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("webgpu"),
    pytest.mark.skipif(webgpu.missing() is not None, reason=f"not installed: {webgpu.missing()}"),
]

PLANTED = Planted()
INPUTS = PLANTED.inputs(4)[0]


def conjunction() -> ir.Model:
    """The one operator of a patch that this model's has not: the mask of packed queries, keys and values."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, PLANTED.tokens, PLANTED.width])
    y = helper.make_tensor_value_info("y", TensorProto.BOOL, [4, PLANTED.tokens, PLANTED.width])
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["some"]),
        helper.make_node("Greater", ["zero", "x"], ["others"]),
        helper.make_node("And", ["some", "others"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "and", [x], [y], [zero]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    return ir.from_proto(model)


@pytest.fixture(scope="module")
def models() -> Mapping[str, ir.Model]:
    base = PLANTED.model()
    patch = fire_on_some(base, draw_patch(base), INPUTS, share=0.2)
    return {"base": base, "patched": atp.bake(base, patch, target="web"), "and": conjunction()}


@pytest.fixture(scope="module")
def seen(models, tmp_path_factory) -> Mapping[str, webgpu.Run]:
    folder = tmp_path_factory.mktemp("webgpu")
    for name, model in models.items():
        atp.save(model, folder / f"{name}.onnx")
    adapter, runs = webgpu.run([folder / f"{name}.onnx" for name in models], INPUTS)
    if adapter is None:
        pytest.skip("WebGPU does not start in this Chromium")
    return dict(zip(models, runs, strict=True))


def placed(seen: webgpu.Run) -> dict[str, int]:
    """How many nodes onnxruntime has placed on which provider."""
    found = [re.search(r"laced on \[(\w+)\]\. Number of nodes: (\d+)", line) for line in seen.lines]
    return {match[1]: int(match[2]) for match in found if match}


def test_every_node_of_a_patch_runs_on_webgpu(models, seen) -> None:
    ours = sum(SITE_KEY in node.metadata_props for node in models["patched"].graph)
    on = "WebGpuExecutionProvider"
    assert set(placed(seen["base"])) == set(placed(seen["patched"])) == {on}
    assert placed(seen["patched"])[on] == placed(seen["base"])[on] + ours


def test_a_conjunction_runs_there_too(seen) -> None:
    assert placed(seen["and"]) == {"WebGpuExecutionProvider": 3}
    assert not seen["and"].outputs["y"].any()


def test_it_computes_what_onnxruntime_does(models, seen) -> None:
    expected, found = run(models["patched"], INPUTS), seen["patched"].outputs
    assert found.keys() == expected.keys()
    assert expected["atpatch/flagged"].mean() > 0
    assert np.array_equal(found["atpatch/flagged"], expected["atpatch/flagged"])
    for name in ("logits", "atpatch/score"):  # other float32 kernels: logits up to 150
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-3)
