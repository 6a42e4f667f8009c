"""The way to the canonical axes and back, as nodes of a graph, against `layout.canonical` in numpy."""

from math import prod

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from models import run, same_bits
from onnx.reference import ReferenceEvaluator
from test_layout import Drawn, layouts

from atpatch_onnx import graph
from atpatch_onnx.baking.moves import axis_size, from_canonical, to_canonical
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import SITE_KEY
from atpatch_onnx.matching.layout import Layout, canonical

SIZES = {"n": 2, "b": 2, "w": 4, "h": 3, "g": 2, "q": 5, "k": 7, "d": 6}

PATTERNS = (
    "nhqk", "n1qk", "hnqk", "nhkq", "nqhd", "nqk", "hqk",
    "(nh)qk", "(nh)qd", "nk(hd)", "nq(hd)", "(nh)dk",
    "bwhqk", "bhwqk", "wbhqk", "bwqk", "(bw)hqk",
    "nhgqk", "nh1kd", "n1hqk", "nq(hgd)", "bwhgqk", "b1w1hqk",
)  # fmt: skip


def there_and_back(pattern: str, sizes: dict[str, int], dtype: ir.DataType = ir.DataType.FLOAT) -> onnx.ModelProto:
    """A model that brings its input, all of whose sizes are free, to the canonical axes (output 0) and back (1)."""
    layout = Layout.parse(pattern)
    x = ir.Value(
        name="x", shape=ir.Shape([f"size_{axis}" for axis in range(len(layout.axes))]), type=ir.TensorType(dtype)
    )
    made = ir.Graph([x], [], nodes=[], name="moves", opset_imports={"": 18})
    at = Insertion(made, "site")
    known = {**sizes, "hg": sizes.get("h", 1) * sizes.get("g", 1)}
    there = to_canonical(at, x, layout, known, "there")
    results = [there, from_canonical(at, there, x, layout, known, "back")]
    for name, value in zip(("canonical", "native"), results, strict=True):
        output = ir.Node("", "Identity", [value])
        output.outputs[0].name, output.outputs[0].type = name, ir.TensorType(dtype)
        made.append(output)
        made.outputs.append(output.outputs[0])
    return onnx.load_from_string(graph.to_bytes(ir.Model(made, ir_version=8)))


def in_reference(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(None, feed), strict=True))


ENGINES = {"onnxruntime": run, "reference": in_reference}

everywhere = pytest.mark.parametrize("engine", ENGINES)


def known_sizes(layout: Layout, sizes: dict[str, int]) -> dict[str, int]:
    """What a site knows: sizes of heads and parts, and the depth only where it has to."""
    return {letter: sizes[letter] for letter in "hgw" if letter in layout.letters}


def random(pattern: str, sizes: dict[str, int]) -> np.ndarray:
    shape = [prod(sizes[letter] for letter in axis) for axis in Layout.parse(pattern).axes]
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@everywhere
@pytest.mark.parametrize("pattern", PATTERNS)
def test_there_as_in_numpy_and_back_bit_for_bit(engine: str, pattern: str) -> None:
    layout, x = Layout.parse(pattern), random(pattern, SIZES)
    found = ENGINES[engine](there_and_back(pattern, known_sizes(layout, SIZES)), {"x": x})
    assert same_bits(found["canonical"], canonical(x, pattern, SIZES))
    assert same_bits(found["native"], x)


@everywhere
@settings(max_examples=60)
@given(drawn=layouts())
def test_drawn_layouts(engine: str, drawn: Drawn) -> None:
    layout = Layout.parse(drawn.pattern)
    folded = "".join(axis for axis in layout.axes if len(axis) > 1)
    assume(sum(letter not in "hgw" for letter in folded) <= 1)  # a Reshape finds out one size; no site needs two
    x = random(drawn.pattern, drawn.sizes)
    found = ENGINES[engine](there_and_back(drawn.pattern, known_sizes(layout, drawn.sizes)), {"x": x})
    assert same_bits(found["canonical"], canonical(x, drawn.pattern, drawn.sizes))
    assert same_bits(found["native"], x)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_graph_serves_every_number_of_samples_queries_and_keys(pattern: str) -> None:
    """Sizes of a trial must not be written into the graph."""
    layout = Layout.parse(pattern)
    model = there_and_back(pattern, known_sizes(layout, SIZES))
    for free in ({}, {"n": 1, "b": 1}, {"n": 5, "b": 5, "q": 1, "k": 9}):
        sizes = {**SIZES, **free}
        x = random(pattern, sizes)
        found = run(model, {"x": x})
        assert same_bits(found["canonical"], canonical(x, pattern, sizes))
        assert same_bits(found["native"], x)


def test_canonical_axes_cost_nothing() -> None:
    for pattern in ("nhqk", "nhkd", "n1qd"):
        model = there_and_back(pattern, {"h": SIZES["h"]})
        assert [node.op_type for node in model.graph.node] == ["Identity", "Identity"]


def test_a_transpose_alone_needs_no_reshape() -> None:
    model = there_and_back("hnqk", {"h": SIZES["h"]})
    assert [node.op_type for node in model.graph.node if node.op_type != "Identity"] == ["Transpose", "Transpose"]


def test_half_precision_is_moved_as_it_is() -> None:
    x = random("nk(hd)", SIZES).astype(np.float16)
    found = run(there_and_back("nk(hd)", {"h": SIZES["h"]}, ir.DataType.FLOAT16), {"x": x})
    assert same_bits(found["canonical"], canonical(x, "nk(hd)", SIZES))
    assert same_bits(found["native"], x)


def test_everything_is_named_and_marked_as_ours() -> None:
    model = there_and_back("b1w1hqk", {"h": SIZES["h"], "w": SIZES["w"]})
    added = [node for node in model.graph.node if node.output[0] not in ("canonical", "native")]
    assert all(node.name.startswith("atpatch/site/") for node in added)
    assert all({entry.key: entry.value for entry in node.metadata_props} == {SITE_KEY: "site"} for node in added)
    assert all(weight.name.startswith("atpatch/site/") for weight in model.graph.initializer)
    assert len({node.name for node in added}) == len(added)


def test_the_size_of_an_axis() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["a", "b"]), type=ir.TensorType(ir.DataType.FLOAT))
    made = ir.Graph([x], [], nodes=[], name="size", opset_imports={"": 18})
    size = axis_size(Insertion(made, "site"), x, 1, "size")
    size.type, size.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    made.outputs.append(size)
    found = run(ir.Model(made, ir_version=8), {"x": np.zeros((2, 9), np.float32)})
    assert np.array_equal(found["atpatch/site/size"], [9])
