"""Neutral keys and values in front of the attention: what comes out, held against float64, and how it is written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from driving import driven
from form_nets import FORMS as FORM_NETS
from hypothesis import given, settings
from hypothesis import strategies as st
from laid_out import DEPTH, HEADS, MAPS, PLACES, TOKENS, around, laid_out
from models import ALWAYS, FORMS, Net, draw_patch, fire_on_some, run, same_bits, see
from nudge import entries
from onnx import helper, numpy_helper
from test_bake import NETS

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.reference import attend, attention_map, replaced
from atpatch_onnx.baking.replace import Decision, replace_tokens, replacements
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import REPLACES_KEY, SITE_KEY
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import Place
from atpatch_onnx.patches.patch import Neutral, Patch

Feed = dict[str, np.ndarray]

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
"""float32 against float64: two layers of sums of up to sixteen products, exponentials of scores of the size of ten."""


# Held against the float64 reference


def oracle(net: Net, feed: Mapping[str, np.ndarray], flags: list[np.ndarray], patch: Patch) -> np.ndarray:
    """`hidden` of a net in float64, with the tokens of each layer neutral that are flagged there."""
    weights = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in net.proto().graph.initializer
    }
    x = feed["x"].astype(np.float64)
    samples, tokens, _ = x.shape
    bias = np.asarray(feed.get("bias", 0.0), np.float64)
    for layer, entry in enumerate(patch.sites):
        assert entry.neutral is not None

        def heads(name: str, count: int, x: np.ndarray = x, layer: int = layer) -> np.ndarray:
            y = x @ weights[f"layer{layer}/{name}/weight"] + weights[f"layer{layer}/{name}/bias"]
            return y.reshape(samples, tokens, count, net.depth).transpose(0, 2, 1, 3)

        Q, K, V = heads("q", net.heads), heads("k", net.kv_heads), heads("v", net.kv_heads)
        K, V = replaced(K, flags[layer], entry.neutral.key), replaced(V, flags[layer], entry.neutral.value)
        past = net.past if net.past is not None and layer == 0 else 0
        if past:
            K, V = (np.concatenate([feed[name], own], axis=2) for name, own in (("past_key", K), ("past_value", V)))
        seen = np.arange(past + tokens)[None] <= past + np.arange(tokens)[:, None]
        P = attention_map(Q, K, bias=bias + np.where(seen | (not net.causal), 0.0, -np.inf))
        y = attend(P, V).transpose(0, 2, 1, 3).reshape(samples, tokens, net.width)
        x = x + y @ weights[f"layer{layer}/o"]
    return x


def told(baked: ir.Model, number: int) -> str:
    """Let a patched model be told what is flagged at a site, by an input of this name: margins `[batch, tokens, 1]`."""
    margin = find_value(baked.graph, read_record(baked).sites[number].margin)
    given_ = ir.Value(name=f"told_{number}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "t", 1]))
    for node, index in list(margin.uses()):
        node.replace_input_with(index, given_)
    baked.graph.inputs.append(given_)
    return str(given_.name)


@dataclass(frozen=True)
class Draw:
    net: Net
    feed: Feed
    flags: list[np.ndarray]
    """Of each layer, `[batch, tokens]`."""

    kind: str


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Shapes, masks, causality, grouped heads, a past, and flags: none, some or all, of one sample or more."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    form = draw(st.sampled_from(["softmax", "guarded", "attention", "packed"]))
    op = form in ("attention", "packed")
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    net = Net(
        opset=draw(st.sampled_from([23, 24] if op else [15, 18, 23])),
        form=form,
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        depth=draw(st.sampled_from([2, 4])),
        bias=draw(st.booleans()),
        causal=op and draw(st.booleans()),
        past=draw(st.sampled_from([None, 1, 3])) if op else None,
        seed=draw(st.integers(0, 3)),
    )
    if net.bias and net.past is not None:
        net = replace(net, past=None)  # the bias of these nets has no columns for it
    grouped = net.kv_heads != net.heads  # such a net takes its sizes from what is there; of operators see `REFUSED`
    batch, tokens = draw(st.integers(1 if op or grouped else 0, 4)), draw(st.integers(1, 6))
    feed = net.feed(rng, batch, tokens)
    if net.bias:
        hidden = rng.random((batch, 1, tokens, tokens)) < draw(st.sampled_from([0.0, 0.4]))
        hidden &= ~np.eye(tokens, dtype=bool)  # every query sees a key
        feed["bias"] = np.where(hidden, np.finfo(np.float32).min, rng.normal(size=hidden.shape)).astype(np.float32)
    quiet = rng.random((batch, 1)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    share = draw(st.sampled_from([0.3, 1.0]))
    flags = [(rng.random((batch, tokens)) < share) & ~quiet for _ in range(net.layers)]
    return Draw(net, feed, flags, draw(st.sampled_from(["linear", "hidden"])))


@settings(max_examples=40)
@given(draws())
def test_outputs_with_given_flags_are_the_float64_references(d: Draw) -> None:
    """Whichever way it is written, optimized or not; samples without a flag keep their bits beside flagged ones."""
    model = d.net.model()
    patch = draw_patch(model, kind=d.kind)
    expected = oracle(d.net, d.feed, d.flags, patch)
    quiet = ~np.any([flags.any(-1) for flags in d.flags], axis=0)
    base = {optimize: run(model, d.feed, optimize=optimize) for optimize in (True, False)}
    for conditional in FORMS:
        baked = bake(model, patch, conditional=conditional, monitor=False)
        names = [told(baked, number) for number in range(d.net.layers)]
        margins = [np.where(flags[..., None], 0.5, -0.5).astype(np.float32) for flags in d.flags]
        for optimize in (True, False):
            found = run(baked, {**d.feed, **dict(zip(names, margins, strict=True))}, optimize=optimize)
            np.testing.assert_allclose(found["hidden"], expected, **CLOSE)
            for name, array in base[optimize].items():
                assert same_bits(found[name][quiet], array[quiet]), name


@settings(max_examples=25)
@given(draws(), st.floats(0.05, 0.5))
def test_what_is_flagged_is_what_exceeds_the_threshold_and_batch_mates_do_not_matter(d: Draw, share: float) -> None:
    """Flags are the detector's own: of each token's key, and carried on."""
    model = d.net.model()
    feed = d.net.feed(np.random.default_rng(0), 8, 5)
    patch = fire_on_some(model, draw_patch(model, kind=d.kind), feed, share=share)
    for conditional in FORMS:
        baked = bake(model, patch, conditional=conditional, site_flags=True)
        found = run(baked, d.feed)
        flags = [found[f"atpatch/site_{number}/flags"] for number in range(d.net.layers)]
        assert (flags[1] >= flags[0]).all(), "flags are carried on"
        np.testing.assert_allclose(found["hidden"], oracle(d.net, d.feed, flags, patch), **CLOSE)
        quiet = ~found["atpatch/flagged"][:, 0]
        assert np.array_equal(~quiet, flags[1].any(-1))
        assert same_bits(found["hidden"][quiet], run(model, d.feed)["hidden"][quiet])
        first = {name: array[:1] for name, array in d.feed.items()}
        assert same_bits(run(baked, first)["hidden"], found["hidden"][:1]), "alone as beside the others"


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
def test_tokens_are_replaced_in_whatever_order_a_tensor_holds_them(name: str, conditional: bool, dtype: str) -> None:
    place: Place = replace(PLACES[name], dtype=dtype)
    kind = ir.DataType[dtype]
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(MAPS, HEADS, TOKENS, DEPTH)).astype(kind.numpy())
    margin = rng.normal(size=(MAPS, TOKENS, 1)).astype(np.float32)
    neutral = Neutral(*(rng.normal(size=(HEADS, DEPTH)).astype(np.float32) for _ in range(2)))
    model = around(place, kind)
    reader = ir.Node("", "Identity", [find_value(model.graph, "tensor")])
    reader.outputs[0].name, reader.outputs[0].type = "read", ir.TensorType(kind)
    model.graph.append(reader)
    model.graph.outputs.append(reader.outputs[0])
    at = Insertion(model.graph, "site", first=True)
    of_site = replace(find_sites(Net().model())[0], key=place, value=replace(place, value="other"))
    (ours, _) = replacements(model.graph, of_site, neutral)
    level = at.constant("level", np.zeros(1, np.float32))
    flags = at.op("Greater", find_value(model.graph, "margin"), level, name="flagged")
    replace_tokens(at, ours, Decision(flags, at.constant("some", np.array([True])) if conditional else None))
    tensor = laid_out(keys, place, rng)
    found = run(model, {"x": np.zeros((MAPS, 1), np.float32), "tensor": tensor, "margin": margin})["read"]
    flagged = margin[..., 0] > 0
    assert 0 < flagged.sum() < flagged.size
    chosen = flagged[:, None, :, None]
    own = entries(found, place, MAPS)
    assert same_bits(own, np.where(chosen, neutral.key.astype(keys.dtype)[None, :, None], keys))
    changed = np.zeros(tensor.size, bool)
    changed[np.flatnonzero(found != tensor)] = True
    assert changed.sum() == flagged.sum() * HEADS * DEPTH, "and nothing else is, queries beside the keys included"


# A batch of none


REFUSED = "onnxruntime's kernel of the op `Attention` wants samples"
CRASHES = "onnxruntime's Einsum divides by zero"
NEVER_EMPTY = {
    **{name: REFUSED for name, net in NETS.items() if net.form in ("attention", "packed")},
    "opset 17, grouped": "it takes its sizes from what is there",
    "Einsum": CRASHES,
    "Einsum of values and map": CRASHES,
}
"""Nets that do not run without a sample, or are not asked to, and why."""

EMPTY: dict[str, tuple[Callable[[], ir.Model], Feed]] = {
    **{name: (net.model, net.feed(np.random.default_rng(0), 0)) for name, net in NETS.items() if net.batch == "batch"},
    **{name: (form.model, form.feed(0)) for name, form in FORM_NETS.items()},
}
"""Nets, and their inputs without a sample."""


@pytest.mark.parametrize("name", [name for name in EMPTY if name not in NEVER_EMPTY])
@pytest.mark.parametrize("conditional", FORMS)
def test_a_batch_of_none_runs_as_it_does_in_the_base(name: str, conditional: bool) -> None:
    build, feed = EMPTY[name]
    model = build()
    baked = bake(model, draw_patch(model, threshold=ALWAYS), conditional=conditional, site_flags=True)
    found = run(baked, feed)
    for output, array in run(model, feed).items():
        assert same_bits(found[output], array)
    assert found["atpatch/flagged"].shape == found["atpatch/score"].shape == (0, 1)
    assert all(found[f"atpatch/{site.name}/flags"].shape[0] == 0 for site in find_sites(model))


# How it is written


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("place", [0, 7], ids=["first", "last"])
def test_a_sample_with_a_nan_does_not_switch_the_fix_off_for_its_batch_mates(conditional: bool, place: int) -> None:
    net = Net()
    model = net.model()
    feed = net.feed(np.random.default_rng(0), 8, 5)
    patch = fire_on_some(model, draw_patch(model), feed, share=0.3)
    baked = bake(model, patch, conditional=conditional)
    expected = run(baked, feed)
    assert expected["atpatch/flagged"].any()
    broken = {name: array.copy() for name, array in feed.items()}
    broken["x"][place] = np.nan
    others = np.arange(8) != place
    for optimize in (True, False):
        expected, found = run(baked, feed, optimize=optimize), run(baked, broken, optimize=optimize)
        for name, array in expected.items():
            assert same_bits(found[name][others], array[others]), name


def ours(baked: ir.Model, site: str) -> list[ir.Node]:
    """Nodes of a site, those within branches included."""
    return [node for node in baked.graph.all_nodes() if node.metadata_props.get(SITE_KEY) == site]


NODES = {("linear", False): 5, ("hidden", False): 8, ("linear", True): 12, ("hidden", True): 15}
"""Of the first site, to which no flags are carried. With an `If`: three nodes of its condition, two more in each."""


@pytest.mark.parametrize("kind", ["linear", "hidden"])
@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("net", [Net(layers=3), Net(layers=3, opset=23, form="attention")], ids=["softmax", "op"])
def test_a_site_that_detects_and_redistributes_has_few_nodes(net: Net, kind: str, conditional: bool) -> None:
    model = net.model()
    baked = bake(model, draw_patch(model, kind=kind), conditional=conditional)
    counts = [len(ours(baked, f"site_{number}")) for number in range(3)]
    carried = 1  # flags of earlier sites
    first = NODES[kind, conditional]
    assert counts == [first, first + carried, first + carried]
    if not conditional:
        assert max(counts) <= 9
    types = [node.op_type for node in ours(baked, "site_0")]
    assert types.count("Where") == 2
    assert types.count("If") == (2 if conditional else 0)


@pytest.mark.parametrize("name", [*NETS, *FORM_NETS])
@pytest.mark.parametrize("conditional", FORMS)
def test_what_stands_in_for_a_tensor_has_its_shape_and_type_declared(name: str, conditional: bool) -> None:
    """A runtime plans memory and layouts by them: one that is not declared has cost bits."""
    model = (NETS[name] if name in NETS else FORM_NETS[name]).model()
    places = {place.value: place for site in find_sites(model) for place in (site.key, site.value)}
    baked = bake(model, draw_patch(model), conditional=conditional)
    found = [node for node in baked.graph if REPLACES_KEY in node.metadata_props]
    assert {node.metadata_props[REPLACES_KEY] for node in found} == set(places)
    for node in found:
        place = places[node.metadata_props[REPLACES_KEY]]
        for result in (node.outputs[0], *_results_of_branches(node)):
            assert result.dtype is ir.DataType[place.dtype]
            assert result.shape is not None
            declared = [size if isinstance(size, int) else size.value for size in result.shape]
            assert declared == list(place.shape)
    proto = onnx.load_from_string(graph.to_bytes(baked))
    kept = {info.name for info in (*proto.graph.value_info, *proto.graph.output)}
    assert {str(node.outputs[0].name) for node in found} <= kept, "in the file, too"


def _results_of_branches(node: ir.Node) -> Iterator[ir.Value]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield from attribute.as_graph().outputs


# Tensors that others have a share in


def with_output(net: Net, *names: str) -> ir.Model:
    """The net, with these tensors `[batch, ...]` as further outputs."""
    proto = net.proto()
    known = {info.name: info for info in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    proto.graph.output.extend(known[name] for name in names)
    return ir.from_proto(proto)


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("tensor", ["sum", "values"])
def test_a_key_that_is_handed_out_into_a_cache_is_the_neutral_one(conditional: bool, which: str, tensor: str) -> None:
    """What is decoded later reads it from there."""
    net, name = Net(), f"layer0/{which}/{tensor}"
    model = with_output(net, name)
    feed = net.feed(np.random.default_rng(0))
    patch = fire_on_some(model, draw_patch(model), feed)
    baked = bake(model, patch, conditional=conditional)
    assert [output.name for output in baked.graph.outputs][:3] == [output.name for output in model.graph.outputs]
    found, base = run(baked, feed, optimize=False), run(model, feed)
    seen = see(baked, model, feed)["site_0"]
    kept = {"k": seen.replaced_key, "v": seen.replaced_value}[which]
    handed = found[name] if tensor == "values" else found[name].reshape(*found[name].shape[:2], 2, 4).swapaxes(1, 2)
    assert same_bits(np.ascontiguousarray(handed), np.ascontiguousarray(kept))
    assert not np.array_equal(found[name], base[name])
    for output, array in driven(model, baked, feed).items():
        assert same_bits(found[output], array), output
    assert graph.to_bytes(unbake(baked)) == graph.to_bytes(model)


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_tensor_that_others_read_is_replaced_for_the_attention_alone(conditional: bool, which: str) -> None:
    net = Net(form="attention", opset=23)
    proto = net.proto()
    proto.graph.node.append(helper.make_node("Abs", [f"layer0/{which}/values"], ["other"], name="node/other"))
    proto.graph.output.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, ["batch", 2, "tokens", 4]))
    model, feed = ir.from_proto(proto), net.feed(np.random.default_rng(0))
    site = find_sites(model)[0]
    place = {"k": site.key, "v": site.value}[which]
    assert (place.value, place.reader) == (f"layer0/{which}/values", "layer0/Y")
    baked = bake(model, fire_on_some(model, draw_patch(model), feed), conditional=conditional)
    found, base = run(baked, feed, optimize=False), run(model, feed, optimize=False)
    assert see(baked, model, feed)["site_0"].flags.any()
    assert same_bits(found["other"], base["other"])
    assert not np.array_equal(found["hidden"], base["hidden"])
    for output, array in driven(model, baked, feed).items():
        assert same_bits(found[output], array), output
    assert graph.to_bytes(unbake(baked)) == graph.to_bytes(model)


@pytest.mark.parametrize("conditional", FORMS)
def test_sites_of_one_map_replace_its_keys_one_after_the_other(conditional: bool) -> None:
    """As where the values of differential attention come in halves: two products, and so two sites, of one softmax."""
    net = Net(layers=1)
    proto = net.proto()
    product = next(node for node in proto.graph.node if node.output[0] == "layer0/Y")
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "layer0/v/weight")
    array = numpy_helper.to_array(weight)
    proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array[:, ::-1]), "layer0/w/weight"))
    made = [
        helper.make_node("MatMul", ["x", "layer0/w/weight"], ["layer0/w/product"], name="node/w/product"),
        helper.make_node("Reshape", ["layer0/w/product", "layer0/v/heads"], ["layer0/w/split"], name="node/w/split"),
        helper.make_node("Transpose", ["layer0/w/split"], ["layer0/w/values"], name="node/w/v", perm=[0, 2, 1, 3]),
        helper.make_node("MatMul", [product.input[0], "layer0/w/values"], ["layer0/Y2"], name="node/Y2"),
        helper.make_node("Add", ["layer0/Y1", "layer0/Y2"], ["layer0/Y"], name="node/Y12"),
    ]
    product.output[0] = "layer0/Y1"
    at = next(index for index, node in enumerate(proto.graph.node) if node.output[0] == "layer0/Y1") + 1
    rest = list(proto.graph.node)[at:]
    del proto.graph.node[at:]
    proto.graph.node.extend([*made, *rest])
    model, feed = ir.from_proto(proto), net.feed(np.random.default_rng(0))
    first, second = find_sites(model)
    assert (first.key.value, first.map) == (second.key.value, second.map)
    patch = fire_on_some(model, draw_patch(model), feed, share=0.3)
    baked = bake(model, patch, conditional=conditional, site_flags=True)
    found = run(baked, feed, optimize=False)
    flags = [found[f"atpatch/{site.name}/flags"] for site in (first, second)]
    assert flags[0].any()
    assert (flags[1] > flags[0]).any(), "the second has flags of its own"
    for output, array in driven(model, baked, feed).items():
        assert same_bits(found[output], array), output
    assert graph.to_bytes(unbake(baked)) == graph.to_bytes(model)
