"""Sound files to begin with."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from fused_cases import floats
from fused_nets import fused_model
from models import Net, draw_patch
from onnx import helper

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.patches.patch import LayerEdit, Patch

NET = Net(layers=2, mlp=6)

DATA = "weights.data"
"""External data of the model `external`; every case finds it beside its file."""


def patch(model: ir.Model) -> Patch:
    """A patch of every site, with one threshold that is exceeded."""
    return draw_patch(model, threshold=0.5)


def _patched(net: Net, conditional: bool) -> onnx.ModelProto:
    return _proto(bake(net.model(), patch(net.model()), conditional=conditional))


def _proto(model: ir.Model) -> onnx.ModelProto:
    return onnx.load_from_string(graph.to_bytes(model))


def _fused() -> onnx.ModelProto:
    sizes = {"query": (2, 3, 8), "key": (2, 3, 8), "value": (2, 3, 8)}
    return _proto(fused_model("MultiHeadAttention", {k: floats(*s) for k, s in sizes.items()}, free=True, num_heads=2))


def _functions() -> onnx.ModelProto:
    """A model whose first product is behind a function that calls another one."""
    model = NET.proto()
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    inner = helper.make_node("Scaled", ["a"], ["b"], domain="own")
    inner.attribute.add(name="by", ref_attr_name="by", type=onnx.AttributeProto.FLOAT)
    relu = helper.make_node("LeakyRelu", ["a"], ["b"])
    relu.attribute.add(name="alpha", ref_attr_name="by", type=onnx.AttributeProto.FLOAT)
    model.functions.append(helper.make_function("own", "Scaled", ["a"], ["b"], [relu], imports, ["by"]))
    model.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], [inner], imports, ["by"]))
    model.opset_import.append(imports[1])
    model.graph.node.append(helper.make_node("Twice", [model.graph.output[0].name], ["end"], domain="own", by=0.5))
    model.graph.output.append(helper.make_tensor_value_info("end", onnx.TensorProto.FLOAT, None))
    return model


def _external() -> onnx.ModelProto:
    """All weights in the file `DATA`."""
    model, offset = NET.proto(), 0
    for tensor in model.graph.initializer:
        size = len(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, DATA, offset, size)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        offset += size
    return model


def external_data() -> bytes:
    return b"".join(tensor.raw_data for tensor in NET.proto().graph.initializer)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": NET.proto,
    "branch": Net(layers=1, y_in_if=True, bias=True).proto,
    "guarded": Net(layers=1, form="guarded").proto,
    "op": Net(layers=1, form="attention", opset=23, past=2).proto,
    "packed": Net(layers=1, form="packed", opset=23, causal=True, half=True).proto,
    "fused": _fused,
    "functions": _functions,
    "external": _external,
    "patched": lambda: _patched(NET, False),
    "conditional": lambda: _patched(Net(layers=1), True),
}


@cache
def model(name: str) -> bytes:
    return bytes(MODELS[name]().SerializeToString())


@cache
def base() -> ir.Model:
    """What patches are baked into."""
    return NET.model()


@cache
def patch_file(folder: Path) -> bytes:
    """A patch of sites and of hidden units, as a file."""
    fix = patch(base())
    layer = find_hidden_layers(base())[0]
    edit = LayerEdit(layer.name, np.array([1, 3]), np.zeros(2, np.float32), np.ones(2, np.float32))
    path = folder / "seed.safetensors"
    Patch(fix.base, fix.sites, {"rates": [0.1, {"a": None}]}, edits=(edit,)).save(path)
    return path.read_bytes()


@cache
def debug_set() -> DebugSet:
    rng = np.random.default_rng(0)
    clean, other = (NET.feed(rng, 6, 5) for _ in range(2))
    suspects = np.zeros((6, 5), bool)
    suspects[:, 1] = True
    return DebugSet.from_pairs(clean, other, np.arange(6) % 2, suspects=suspects, target=1)
