"""What a patch adds to a run, in nodes: how many, of which operators, and nothing that a device must wait for."""

from collections import Counter
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from form_nets import FORMS as NETS
from fused_cases import ATTENTION, CASES
from models import Net, draw_patch
from place_nets import NEARER, RECIPES
from planted import Planted
from test_fused import one_node

import atpatch_onnx as atp
from atpatch_onnx.baking.kernels import Kernels, SiteKernels, kernels, sizes_of
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph.names import SITE_KEY
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.patches.patch import LayerEdit, Patch
from samples.documented import LISTS, sizes_at_run_time, unlisted

ONE_SEQUENCE = "all samples in one sequence"
"""Its samples have no axis, so where their number is free, the outputs by sample need it."""

CONTROL_FLOW = {"If", "Loop", "Scan"}
OF_DATA = {"NonZero", "Compress", "Unique", "Shape", "Size"}
"""Operators whose results have shapes that depend on data, or are shapes."""


def ours(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if SITE_KEY in node.metadata_props]


def all_models() -> Iterator[tuple[str, ir.Model]]:
    """Every form: decomposed, op Attention, MultiHeadAttention, GroupQueryAttention; half precision among them."""
    for name, form in NETS.items():
        yield f"{name}, free", form.model("batch")
        yield f"{name}, fixed", form.model(3)
    for name, recipe in {**RECIPES, **NEARER}.items():
        yield name, recipe.written()[0]
    for name, case in CASES.items():
        if case.op != ATTENTION:
            for free in (False, True):
                yield f"{name}, {'free' if free else 'fixed'}", one_node(case, free=free, opset=18)[0]
    for form, opset in (("attention", 23), ("packed", 23), ("softmax", 18)):
        yield f"half, {form}", Net(half=True, form=form, opset=opset).model()


MODELS = dict(all_models())


@pytest.mark.parametrize("name", MODELS)
def test_a_cuda_graph_can_be_captured(name: str) -> None:
    """No control flow, and nothing of the patch on the host: no shapes, nothing whose size depends on data."""
    patched = atp.bake(MODELS[name], draw_patch(MODELS[name]), target="cuda")
    operators = {node.op_type for node in ours(patched)}
    assert not operators & CONTROL_FLOW
    assert not read_record(patched).conditional
    if name == f"{ONE_SEQUENCE}, free":
        sizes = {node.name for node in sizes_of(patched.graph)}
        assert sizes
        assert all(node.name in sizes or node.op_type not in OF_DATA for node in ours(patched))
        quiet = atp.bake(MODELS[name], draw_patch(MODELS[name]), target="cuda", monitor=False)
        assert not sizes_of(quiet.graph), "only outputs by sample ask for their number"
    else:
        assert not operators & OF_DATA
        assert not sizes_of(patched.graph)


@pytest.mark.parametrize("listed", LISTS, ids=[listed.target for listed in LISTS])
def test_other_runtimes_document_what_a_patch_is_written_with(listed) -> None:
    missing: Counter[str] = Counter()
    for name, model in MODELS.items():
        patched = atp.bake(model, draw_patch(model), target="cuda")
        missing.update(unlisted(patched, listed))
        if name != f"{ONE_SEQUENCE}, free":
            assert sizes_at_run_time(patched) == (), name
    assert set(missing) == ({"And(bool)", "Max(float)"} if listed.target == "web" else set())


def bfloat16(opset: int) -> ir.Model:
    """Two attentions in bfloat16."""
    model = Net(half=True, opset=opset).model()
    for value in [*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)]:
        if value.dtype is ir.DataType.FLOAT16:
            value.dtype = ir.DataType.BFLOAT16
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy()
        if array.dtype == np.float16:
            value.const_value = ir.tensor(array.astype(ml_dtypes.bfloat16), name=name)
            value.dtype = ir.DataType.BFLOAT16
    for node in model.graph:
        to = node.attributes.get("to")
        if to is not None and to.as_int() == ir.DataType.FLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.BFLOAT16)
    return model


def test_bfloat16_is_written_with_what_cuda_has() -> None:
    model = bfloat16(18)
    patched = atp.bake(model, draw_patch(model), target="cuda")
    where = [node for node in ours(patched) if node.op_type == "Where"]
    assert where
    assert {node.outputs[0].dtype for node in where} == {ir.DataType.BFLOAT16}
    cuda, directml = (next(one for one in LISTS if one.target == name) for name in ("cuda", "directml"))
    assert unlisted(patched, cuda) == ()
    assert "Where(bfloat16)" in unlisted(patched, directml)


def test_bfloat16_before_opset_16_is_refused() -> None:
    """`Where` takes it from then on, in onnx and in every runtime."""
    model = bfloat16(15)
    with pytest.raises(BakeError, match="bfloat16 at opset 15, Where takes it from 16 on"):
        atp.bake(model, draw_patch(model), target="cuda")


# How many


def counted(model: ir.Model, patch: Patch | None = None, **options) -> Kernels:
    return kernels(atp.bake(model, draw_patch(model) if patch is None else patch, target="cuda", **options))


def test_every_launched_node_is_counted_once() -> None:
    for name, model in MODELS.items():
        patched = atp.bake(model, draw_patch(model), target="cuda")
        views = {"Reshape", "Squeeze", "Unsqueeze"}
        expected = [node for node in ours(patched) if node.op_type not in views and node not in sizes_of(patched.graph)]
        assert kernels(patched).total == len(expected), name


def test_kernels_of_a_site_by_what_it_does() -> None:
    """A product and a threshold; the larger of two from the second site on; a comparison and two choices."""
    model = Planted().model()
    found = counted(model)
    assert list(found.sites) == [
        SiteKernels("layer0.attention", 2, 0, 3),
        SiteKernels("layer1.attention", 2, 1, 3),
        SiteKernels("layer2.attention", 2, 1, 3),
    ]
    assert (found.edits, found.monitors, found.total) == (0, 2, 19)
    assert [one.total for one in found.sites] == [5, 6, 6]
    hidden = counted(model, draw_patch(model, kind="hidden"))
    assert [one.detecting for one in hidden.sites] == [5, 5, 5], "and a bias, a ReLU and a second product"
    later = counted(model, draw_patch(model, detects=[True, False, False]))
    assert [(one.detecting, one.carrying, one.redistributing) for one in later.sites] == [
        (2, 0, 3),
        (0, 0, 3),
        (0, 0, 3),
    ]
    assert counted(model, monitor=False).monitors == 0


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("GroupQueryAttention", 3),
        ("GroupQueryAttention, packed", 3),
        ("MultiHeadAttention, keys and values packed", 2),
        ("MultiHeadAttention, packed", 3),
    ],
)
def test_packed_keys_and_values_take_one_choice(name: str, kernels: int) -> None:
    """Flags, and one `Where`; a mask of its columns where the tensor holds queries as well."""
    model = RECIPES[name].written()[0]
    [site] = counted(model).sites
    assert (site.detecting, site.redistributing) == (2, kernels)


def test_half_precision_reads_by_one_more() -> None:
    single, half = (counted(Net(half=half).model()) for half in (False, True))
    assert [one.detecting for one in half.sites] == [one.detecting + 1 for one in single.sites]


def test_counts_as_json_and_of_edits() -> None:
    model = Planted(mlp=8).model()
    [layer, *_] = find_hidden_layers(model)
    edit = LayerEdit(layer.name, np.array([1]), np.zeros(1, np.float32), np.ones(1, np.float32))
    found = counted(model, Patch(base=atp.fingerprint(model), sites=(), edits=(edit,)))
    assert found.to_json() == {"total": 3, "sites": {}, "edits": 3, "monitors": 0}
