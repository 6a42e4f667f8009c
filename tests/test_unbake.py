"""Unbaking gives the base back, and refuses whatever is not a patched file as it was baked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import FORMS, Net, draw_patch, run, same_bits
from onnx import numpy_helper
from test_bake import nets

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.errors import UnbakeError


@nets
def test_what_remains_is_the_base_after_saving_and_loading(net: Net, tmp_path: Path) -> None:
    onnx.save(net.proto(), tmp_path / "base.onnx")
    model = graph.load(tmp_path / "base.onnx")
    feed = net.feed(np.random.default_rng(0))
    for conditional in FORMS:
        graph.save(bake(model, draw_patch(model), conditional=conditional, site_flags=True), tmp_path / "p.onnx")
        patched = graph.load(tmp_path / "p.onnx")
        before = graph.to_bytes(patched)
        unbaked = unbake(patched)
        assert graph.to_bytes(patched) == before, "the patched model is left alone"
        assert graph.fingerprint(unbaked) == graph.fingerprint(model)
        assert graph.to_bytes(unbaked) == graph.to_bytes(model), "byte for byte what loading and saving the base gives"
        graph.save(unbaked, tmp_path / "s.onnx")
        assert graph.fingerprint(graph.load(tmp_path / "s.onnx")) == graph.fingerprint(model)
    base, again = run(net.proto(), feed), run(unbaked, feed)
    assert base.keys() == again.keys()
    assert all(same_bits(again[name], value) for name, value in base.items())


def test_unbaking_and_baking_again_gives_the_same_file() -> None:
    model = Net(opset=23, form="packed", y_in_if=True).model()
    patch = draw_patch(model)
    baked = bake(model, patch)
    assert graph.to_bytes(bake(unbake(baked), patch)) == graph.to_bytes(baked)


def test_models_without_a_patch_are_refused() -> None:
    with pytest.raises(UnbakeError, match="expected a patched model"):
        unbake(Net().model())


# Tampering


def _weight(proto: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "layer0/o")
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _remove(name: str) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        node = next(node for node in proto.graph.node if node.name == name)
        proto.graph.node.remove(node)

    return edit


def _rename_node(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if node.name == "node/pooled").name = "node/other"


def _attribute(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Softmax")
    node.attribute[0].i = 3


def _metadata(key: str, value: str | None) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        entry = next(entry for entry in proto.metadata_props if entry.key == f"atpatch.{key}")
        if value is None:
            proto.metadata_props.remove(entry)
        else:
            entry.value = value

    return edit


def _foreign_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="author", value="someone")


def _extra_node(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(onnx.helper.make_node("Neg", ["logits"], ["negative"], name="extra"))


def _rename_replaced(proto: onnx.ModelProto) -> None:
    """The keys of the base get another name, with all that reads them."""
    nodes = list(proto.graph.node)
    while nodes:
        node = nodes.pop()
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]
        for values in (node.input, node.output):
            for number, name in enumerate(values):
                if name == "layer0/k/sum":
                    values[number] = "layer0/k/other"


def _read_the_bases(proto: onnx.ModelProto) -> None:
    """The base's nodes read their own keys again, and nobody ours."""
    for node in proto.graph.node:
        for number, name in enumerate(node.input):
            if name == "atpatch/site_0/key":
                node.input[number] = "layer0/k/sum"


def _replace_another(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.name == "atpatch/site_0/key")
    next(entry for entry in node.metadata_props if entry.key == "atpatch.replaces").value = "logits"


def _extra_user(proto: onnx.ModelProto) -> None:
    """A node of no one's making that reads one of our values."""
    proto.graph.node.append(onnx.helper.make_node("Not", ["atpatch/flagged"], ["unflagged"], name="extra"))


def _mark_dropped(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.name == "atpatch/site_0/margin")
    del node.metadata_props[:]


def _mark_added(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.name == "node/logits")
    node.metadata_props.add(key="atpatch.site", value="site_0")


TAMPERING = {
    "changed weight": _weight,
    "removed node of the base": _remove("node/logits"),
    "removed node of ours": _remove("atpatch/site_0/margin"),
    "renamed node": _rename_node,
    "changed attribute": _attribute,
    "added metadata": _foreign_metadata,
    "added node": _extra_node,
    "added node that reads ours": _extra_user,
    "renamed keys of the base": _rename_replaced,
    "replacement of another value": _replace_another,
    "node of ours without its mark": _mark_dropped,
    "node of the base marked as ours": _mark_added,
    **{
        f"metadata {key}={value!r}": _metadata(key, value)
        for key, values in {
            "base": ("sha256:0", "", None),
            "schema": ("2", "", None),
            "sites": ("null", "no json", "[1]", '[{"site": "x"}]', "[" * 100_000, None),
            "monitors": ("3", "no json", "null", None),
            "figures": ("3", "no json", "null", None),
            "conditional": ("perhaps", "", None),
            "patch": (None,),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("edit", TAMPERING.values(), ids=[name[:40] for name in TAMPERING])
@pytest.mark.parametrize("conditional", FORMS)
def test_tampered_files_are_refused(edit: Callable[[onnx.ModelProto], None], conditional: bool) -> None:
    model = Net().model()
    proto = onnx.load_from_string(graph.to_bytes(bake(model, draw_patch(model), conditional=conditional)))
    edit(proto)
    with pytest.raises(UnbakeError):
        unbake(ir.from_proto(proto))


@pytest.mark.parametrize("conditional", FORMS)
def test_a_replacement_that_nobody_reads_any_more_is_no_loss(conditional: bool) -> None:
    """What remains is the base all the same, and its fingerprint says so."""
    model = Net().model()
    proto = onnx.load_from_string(graph.to_bytes(bake(model, draw_patch(model), conditional=conditional)))
    _read_the_bases(proto)
    assert graph.to_bytes(unbake(ir.from_proto(proto))) == graph.to_bytes(model)
