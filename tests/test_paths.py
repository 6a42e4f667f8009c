"""How far an entry of an input reaches in a graph: never less than it does, and no more where a proof needs that."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, draw_patch, run
from onnx import TensorProto, helper, numpy_helper
from planted import Planted

import atpatch_onnx as atp
from atpatch_onnx.measuring.paths import reach, walked
from atpatch_onnx.patches.patch import Patch, Places

TOKENS, WIDTH, TOKEN = 5, 6, 2
"""Of the input `x` `[n, TOKENS, WIDTH]`; the source is a token."""

ALL, OWN, NONE = "all", "own", "none"
"""What of a result the token may reach: everything, its own row `[n, TOKEN]` of axis 1, or nothing."""

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Op:
    """One operator with `x` as its first operand."""

    name: str
    reached: str
    others: tuple[np.ndarray, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    first: tuple[np.ndarray, ...] = ()
    """Operands before `x`."""

    def model(self, batch: int | str = "n", opset: int = 18) -> ir.Model:
        operands = [*self.first, None, *self.others]
        names = ["x" if one is None else f"w{index}" for index, one in enumerate(operands)]
        results = [f"y{index}" for index in range(self.outputs)]
        node = helper.make_node(self.name, names, results, name="op", **self.attributes)
        graph = helper.make_graph(
            [node],
            "op",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, TOKENS, WIDTH])],
            [helper.make_empty_tensor_value_info(name) for name in results],
            [numpy_helper.from_array(one, f"w{index}") for index, one in enumerate(operands) if one is not None],
        )
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


MASK = np.arange(TOKENS)[:, None] == TOKEN

OPS = {
    "add": Op("Add", OWN, (floats(WIDTH),)),
    "relu": Op("Relu", OWN),
    "clip": Op("Clip", OWN, (np.float32(-1), np.float32(1))),
    "where, its own entries cut out": Op("Where", NONE, (), first=(MASK, floats(1, 1))),
    "where, others cut out": Op("Where", OWN, (), first=(~MASK, floats(1, 1))),
    "matmul": Op("MatMul", OWN, (floats(WIDTH, 3),)),
    "matmul, over tokens": Op("MatMul", ALL, (), first=(floats(3, TOKENS),)),
    "softmax": Op("Softmax", OWN, attributes={"axis": -1}),
    "softmax over tokens": Op("Softmax", ALL, attributes={"axis": 1}),
    "layer norm": Op("LayerNormalization", OWN, (floats(WIDTH),), {"axis": -1}),
    "layer norm over tokens too": Op("LayerNormalization", ALL, (floats(TOKENS, WIDTH),), {"axis": 1}),
    "mean over features": Op("ReduceMean", OWN, (ints(-1),)),
    "mean over tokens": Op("ReduceMean", ALL, (ints(1),)),
    "largest of all": Op("ReduceMax", ALL, (), {"keepdims": 0}),
    "argmax over features": Op("ArgMax", OWN, attributes={"axis": -1, "keepdims": 0}),
    "argmax over tokens": Op("ArgMax", ALL, attributes={"axis": 1}),
    "cumulative sum over tokens": Op("CumSum", ALL, (np.array(1),)),
    "transpose": Op("Transpose", OWN, attributes={"perm": [0, 1, 2]}),
    "split heads": Op("Reshape", OWN, (ints(0, 0, 2, -1),)),
    "features and tokens in one": Op("Reshape", ALL, (ints(-1, TOKENS * WIDTH),)),
    "flatten": Op("Flatten", ALL),
    "unsqueeze": Op("Unsqueeze", OWN, (ints(-1),)),
    "class token": Op("Gather", NONE, (np.array(0),), {"axis": 1}),
    "all tokens but it": Op("Gather", NONE, (ints(0, 1, 3, -1),), {"axis": 1}),
    "slice with it": Op("Slice", OWN, (ints(0), ints(2**62), ints(1), ints(1))),
    "slice without it": Op("Slice", NONE, (ints(3), ints(2**62), ints(1))),
    "split": Op("Split", ALL, (ints(2, 3),), {"axis": 1}, outputs=2),
    "concat": Op("Concat", OWN, (), {"axis": 2}),
    "tile": Op("Tile", OWN, (ints(1, 1, 2),)),
    "expand": Op("Expand", OWN, (ints(1, 1, 1),)),
    "shape": Op("Shape", NONE),
    "not followed": Op("GlobalAveragePool", ALL),
    "not followed, over features": Op("LpNormalization", ALL),
}


def source(*places: int) -> dict[str, np.ndarray]:
    entries = np.zeros((1, TOKENS, WIDTH), bool)
    entries[:, list(places)] = True
    return {"x": entries}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_what_depends_on_a_token_is_reached_and_a_proof_is_found_where_nothing_does(op: Op):
    found = reach(op.model(), source(TOKEN))
    assert bool(found.outputs) == (op.reached != NONE)
    assert reach(op.model(), source()).outputs == ()
    x = floats(3, TOKENS, WIDTH)
    other = x.copy()
    other[:, TOKEN] = floats(3, WIDTH) + 1
    before, after = run(op.model(), {"x": x}, optimize=False), run(op.model(), {"x": other}, optimize=False)
    changed = {name for name, array in before.items() if not np.array_equal(array, after[name])}
    assert changed <= set(found.outputs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("batch", ["n", 3])
def test_another_token_is_told_apart_where_it_stays_apart(op: Op, batch: int | str):
    """Behind each operator its own row of the result is cut away: what is left is reached by mixing alone."""
    if op.outputs > 1 or op.reached == NONE or op.name in ("GlobalAveragePool", "LpNormalization"):
        pytest.skip("nothing is cut away")
    model = op.model(batch)
    others = ir.Value(name="others", const_value=ir.tensor(ints(0, 1, 3, 4), name="others"))
    rest = ir.Node("", "Gather", [model.graph.outputs[0], others], [ir.AttrInt64("axis", 1)])
    rest.outputs[0].name = "rest"
    model.graph.register_initializer(others)
    if op.reached == OWN:
        model.graph.append(rest)
        model.graph.outputs[0] = rest.outputs[0]
    assert bool(reach(model, source(TOKEN)).outputs) == (op.reached == ALL)


# Drawn graphs: what changes with the source is reached, entry by entry

SQUARE, MIXING = floats(WIDTH, WIDTH), floats(TOKENS, TOKENS)
STEPS = {
    "add": [("Add", ["x", floats(WIDTH)], {})],
    "gate": [("Sigmoid", ["x"], {}), ("Mul", ["x", "0"], {})],
    "product": [("MatMul", ["x", SQUARE], {})],
    "mix": [("MatMul", [MIXING, "x"], {})],
    "softmax": [("Softmax", ["x"], {"axis": -1})],
    "over tokens": [("Softmax", ["x"], {"axis": 1})],
    "norm": [("LayerNormalization", ["x", floats(WIDTH)], {"axis": -1})],
    "neutral": [("Where", [MASK[None], floats(1, 1, WIDTH), "x"], {})],
    "neutral feature": [("Where", [np.arange(WIDTH) == 3, floats(WIDTH), "x"], {})],
    "turned": [("Gather", ["x", ints(1, 2, 0, 4, 3)], {"axis": 1})],
    "turned, tokens first": [
        ("Transpose", ["x"], {"perm": [1, 0, 2]}),
        ("GatherND", ["0", ints(1, 2, 0, 4, 3)[:, None]], {}),
        ("Transpose", ["1"], {"perm": [1, 0, 2]}),
    ],
    "heads": [
        ("Reshape", ["x", ints(0, 0, 2, 3)], {}),
        ("Transpose", ["0"], {"perm": [0, 2, 1, 3]}),
        ("Softmax", ["1"], {"axis": -1}),
        ("Transpose", ["2"], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["3", ints(0, TOKENS, -1)], {}),
    ],
    "halves": [
        ("Slice", ["x", ints(0), ints(3), ints(1)], {}),
        ("Slice", ["x", ints(3), ints(2**62), ints(1)], {}),
        ("Concat", ["1", "0"], {"axis": 1}),
    ],
    "attention": [
        ("Where", [MASK[None], floats(1, 1, WIDTH), "x"], {}),
        ("Transpose", ["0"], {"perm": [0, 2, 1]}),
        ("MatMul", ["x", "1"], {}),
        ("Softmax", ["2"], {"axis": -1}),
        ("MatMul", ["3", "0"], {}),
        ("Add", ["x", "4"], {}),
    ],
    "sizes": [
        ("Shape", ["x"], {}),
        ("Gather", ["0", ints(0)], {"axis": 0}),
        ("Concat", ["1", ints(TOKENS), ints(1)], {"axis": 0}),
        ("Expand", [floats(1, 1, WIDTH), "2"], {}),
        ("Add", ["3", "x"], {}),
    ],
}
"""Operators that lead from `[n, TOKENS, WIDTH]` to the same; operands are `x`, results before by number, or weights."""


def chained(names: list[str]) -> ir.Model:
    nodes, weights, x = [], [], "x"
    for number, name in enumerate(names):
        results: list[str] = []
        for step, (op_type, operands, attributes) in enumerate(STEPS[name]):
            given = []
            for place, one in enumerate(operands):
                if isinstance(one, np.ndarray):
                    weights.append(numpy_helper.from_array(one, f"w{number}/{step}/{place}"))
                    given.append(weights[-1].name)
                else:
                    given.append(x if one == "x" else results[int(one)])
            results.append(f"y{number}/{step}")
            nodes.append(helper.make_node(op_type, given, results[-1:], **attributes))
        x = results[-1]
    shape = ["n", TOKENS, WIDTH]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", x)]
    graph = helper.make_graph(nodes, "chained", ends[:1], ends[1:], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@settings(deadline=None, max_examples=60)
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_whatever_changes_with_the_source_is_reached(names: list[str], seed: int):
    rng = np.random.default_rng(seed)
    entries = rng.random((1, TOKENS, WIDTH)) < rng.choice([0.05, 0.3])
    model = chained(names)
    told = walked(model, {"x": entries}).of(model.graph.outputs[0])
    assert told.sizes == (None, TOKENS, WIDTH), "every rule follows"
    x = rng.normal(size=(3, TOKENS, WIDTH)).astype(np.float32)
    other = np.where(entries, rng.normal(size=x.shape), x).astype(np.float32)
    (before,), (after,) = (run(model, {"x": one}, optimize=False).values() for one in (x, other))
    assert not ((before != after) & ~told.reached).any()


# Whole models


def always(model: ir.Model, *places: int, tokens: int) -> Patch:
    drawn = draw_patch(model)
    marks = np.zeros(tokens, np.float32)
    marks[list(places)] = 1
    first, *others = drawn.sites
    return replace(
        drawn,
        sites=(replace(first, detector=Places(marks)), *(replace(one, detector=None) for one in others)),
    )


def patched_net(net: Net, *places: int, conditional: bool | None = None) -> ir.Model:
    return atp.bake(net.model(), always(net.model(), *places, tokens=5), conditional=conditional)


def head(model: ir.Model, op_type: str, *others: np.ndarray, **attributes: int) -> ir.Model:
    """The model with an operator behind its hidden states, which is its only output."""
    hidden = next(value for value in model.graph.outputs if value.name == "hidden")
    operands = [
        ir.Value(name=f"head{index}", const_value=ir.tensor(one, name=f"head{index}"))
        for index, one in enumerate(others)
    ]
    for value in operands:
        model.graph.register_initializer(value)
    attrs = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    node = ir.Node("", op_type, [hidden, *operands], attrs, name="head")
    node.outputs[0].name = "read"
    model.graph.append(node)
    model.graph.outputs[:] = node.outputs
    return model


NETS = {
    "decomposed": Net(tokens=5, mlp=7),
    "decomposed, old": Net(tokens=5, opset=15),
    "decomposed, grouped": Net(tokens=5, opset=17, heads=4, kv_heads=2),
    "guarded": Net(tokens=5, form="guarded", bias=True),
    "fixed batch": Net(tokens=5, batch=3),
    "op": Net(tokens=5, opset=23, form="attention"),
    "op, packed": Net(tokens=5, opset=23, form="packed"),
}

nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())


def of_token(net: Net, place: int) -> dict[str, np.ndarray]:
    entries = np.zeros((1, 5, net.width), bool)
    entries[:, place] = True
    return {"x": entries}


@nets
def test_a_head_that_reads_another_token_does_not_depend_on_the_neutral_one(net: Net):
    model = head(patched_net(net, 1), "Gather", np.array(0), axis=1)
    found = reach(model, of_token(net, 1))
    assert found.outputs == ()
    assert "no path leads to any of the outputs" in str(found)


@nets
def test_another_token_reaches_it(net: Net):
    model = head(patched_net(net, 1), "Gather", np.array(0), axis=1)
    assert reach(model, of_token(net, 2)).outputs == ("read",)
    assert reach(head(net.model(), "Gather", np.array(0), axis=1), of_token(net, 1)).outputs == ("read",)


@nets
def test_what_reads_its_own_stream_is_a_path(net: Net):
    own = head(patched_net(net, 1), "Gather", np.array(1), axis=1)
    assert reach(own, of_token(net, 1)).outputs == ("read",)
    whole = reach(head(patched_net(net, 1), "ArgMax", axis=1), of_token(net, 1))
    assert whole.outputs == ("read",)
    assert str(whole).startswith("a path leads to read, by ")
    assert str(whole).endswith("head")


def test_one_site_that_is_left_alone_is_a_path():
    net = NETS["decomposed"]
    whole = always(net.model(), 1, tokens=5)
    first, last = whole.sites
    silent = replace(last, neutral=None, detector=Places(first.detector.marks))
    for sites in ((first, silent), (replace(first, neutral=None), last)):
        model = head(atp.bake(net.model(), replace(whole, sites=sites)), "Gather", np.array(0), axis=1)
        assert reach(model, of_token(net, 1)).outputs == ("read",)


def test_a_value_that_is_replaced_but_whose_key_is_not_is_a_path():
    net = NETS["decomposed"]
    model = head(patched_net(net, 1), "Gather", np.array(0), axis=1)
    node = next(node for node in model.graph if node.op_type == "Where" and node.name.endswith("/key"))
    for reader, index in list(node.outputs[0].uses()):
        reader.replace_input_with(index, node.inputs[2])
    assert reach(model, of_token(net, 1)).outputs == ("read",)


def test_an_if_of_a_site_that_detects_elsewhere_is_looked_into():
    """A later site detects by keys: replacements stand in an `If`, whose condition is constant for the first."""
    net = NETS["decomposed"]
    drawn = draw_patch(net.model())
    marks = np.zeros(5, np.float32)
    marks[1] = 1
    patch = replace(drawn, sites=(replace(drawn.sites[0], detector=Places(marks)), drawn.sites[1]))
    baked = atp.bake(net.model(), patch, conditional=True, monitor=False)
    assert any(node.op_type == "If" for node in baked.graph)
    model = head(baked, "Gather", np.array(0), axis=1)
    found = reach(model, of_token(net, 1))
    assert found.outputs == ("read",)
    assert "If) is not followed" in str(found), "what the second site flags depends on its keys"


def test_what_a_file_declares_proves_nothing():
    """A value that is said to have another shape than it has."""
    model = patched_net(NETS["decomposed"], 1)
    for node in model.graph:
        for value in node.outputs:
            value.shape = ir.Shape([1])
    assert reach(head(model, "Gather", np.array(0), axis=1), of_token(NETS["decomposed"], 1)).outputs == ()


def test_a_source_of_an_input_whose_sizes_are_not_known_is_everywhere():
    net = Net()
    entries = np.ones((1, 1, net.width), bool)
    assert reach(net.model(), {"x": entries}).outputs == ("logits", "hidden")


# What `verify` makes of it


LEANING = Planted(kind="attribute", harm=8.0, drawn=(0,), harmful=(1, 2))


@pytest.fixture(scope="module")
def fixed() -> Patch:
    return atp.fit(LEANING.model(), LEANING.debug(400), atp.FitOptions(always=True))


def checked(base: ir.Model, patched: ir.Model, debug: atp.DebugSet | None = None) -> dict[str, tuple[bool, str]]:
    return {check.name: (check.passed, check.detail) for check in atp.verify(base, patched, debug).checks}


def test_verify_proves_that_no_path_leads_from_the_attribute_and_tries_every_value(fixed):
    debug = LEANING.debug(50, seed=2)
    found = checked(LEANING.model(), atp.bake(LEANING.model(), fixed), debug)
    assert found["no path"][0]
    assert found["no path"][1].startswith("from x[1, 1], no path leads to any of the outputs")
    assert found["every value"][0]
    assert found["every value"][1].startswith("50 of 50 inputs keep the bits of every output under")


def test_without_pairs_the_entries_are_named_that_reach_nothing(fixed):
    found = checked(LEANING.model(), atp.bake(LEANING.model(), fixed))
    passed, said = found["no path"]
    assert passed
    assert said.startswith("from x[1, 0], x[1, 1]")
    assert "x[0" not in said
    assert "every value" not in found


def test_a_fix_that_leaves_a_path_is_not_said_to_be_proven(fixed):
    """A second output reads all tokens: the attribute decides something, although no prediction."""
    planted = replace(LEANING, scalar_output=True)
    model = planted.model()
    patch = atp.fit(model, planted.debug(400), atp.FitOptions(always=True))
    found = checked(model, atp.bake(model, patch), planted.debug(50, seed=2))
    passed, said = found["no path"]
    assert not passed
    assert "a path leads to largest" in said


def test_a_patch_that_detects_promises_nothing_of_the_kind():
    patch = draw_patch(LEANING.model())
    assert "no path" not in checked(LEANING.model(), atp.bake(LEANING.model(), patch), LEANING.debug(20, seed=2))


def test_a_level_that_switches_a_site_off_is_found_by_the_proof(fixed):
    model = atp.bake(LEANING.model(), fixed)
    value = model.graph.initializers["atpatch/layer1.attention/level"]
    value.const_value = ir.tensor(np.array([2.0], np.float32), name=value.name)
    found = checked(LEANING.model(), model, LEANING.debug(50, seed=2))
    assert not found["parameters"][0]
    assert not found["no path"][0]
    assert not found["every value"][0]


def test_the_tests_of_operators_cover_every_rule():
    from atpatch_onnx.measuring.path_rules import _ELEMENTWISE, _RULES

    left = set(_RULES) - set(_ELEMENTWISE) - {op.name for op in OPS.values()}
    assert {name for name in left if not name.startswith("Reduce")} == {
        "ArgMin", "Attention", "Cast", "CastLike", "Constant", "ConstantOfShape", "GatherND", "Gemm", "Identity",
        "LogSoftmax", "RMSNormalization", "Range", "Squeeze",
    }  # fmt: skip
