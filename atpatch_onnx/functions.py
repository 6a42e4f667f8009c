"""The onnxscript functions that probe and patched graphs share: column features, detector, redistribution.

What the detector is fitted on is what it sees when served, because both graphs call these functions. The arithmetic is
that of design section 5; `atpatch_onnx.redistribution` is the numpy form of it. Shapes are in brackets: B maps,
H heads, Hv heads of the values, Q queries, K keys, D depth, F features. All arithmetic is float32, whatever the model's
precision. Every function runs from opset 15 on; `local_functions` makes them ready for a model's own opset.

Weights that a running service may exchange (`SessionOptions.add_initializer`) meet a value that is computed before they
meet a constant, and never stand alone in a sum or a product: optimizers fold constants, and drop `+ 0` and `* 1`, by
what the file says.
"""

import onnx_ir as ir
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from atpatch_onnx.domain import DOMAIN, DOMAIN_VERSION

SUMMARIES = ("mean", "first query", "quarter 1", "quarter 2", "quarter 3", "quarter 4", "maximum", "own query")
"""The per-head column features of `ColumnSummary`, in order."""

_domain = Opset(DOMAIN, DOMAIN_VERSION)
_TINY = 1e-30
_UNSEEN = -8.0


@script(_domain, default_opset=op)
def WholeColumns(P):  # noqa: N802
    """Column features of a fixed-length, unmasked map: the column itself. P [B,H,Q,K] -> [B,H*Q,K].

    The factor K that makes weights relative to the uniform share is folded into the detector's offset and bias.
    """
    keys = op.Shape(P, start=3, end=4)
    columns = op.Concat(op.Constant(value_ints=[0, -1]), keys, axis=0)
    return op.Cast(op.Reshape(P, columns), to=1)


@script(_domain, default_opset=op)
def ValidQueries(P):  # noqa: N802
    """Which queries of self-attention are tokens, not padding. P [B,H,Q,K] -> float [B,1,Q,1], 1 or 0.

    A padded position's key is masked, for its own query too. In a row that is masked entirely some exporters write the
    uniform row over all keys, masked ones included; such a row is no token's either. Nor is one that sees its own key
    only, which no other query sees: what masks do that let padding attend to itself.
    """
    weights = op.Cast(P, to=1)
    queries = op.Shape(P, start=2, end=3)
    keys = op.Shape(P, start=3, end=4)
    none = op.Constant(value_float=0.0)
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    rows = op.Range(zero, op.Squeeze(queries), one)
    columns = op.Range(zero, op.Squeeze(keys), one)
    own_key = op.Unsqueeze(rows + (keys - queries), op.Constant(value_ints=[1]))
    own = op.Cast(own_key == op.Unsqueeze(columns, op.Constant(value_ints=[0])), to=1)

    seen = op.ReduceMax(weights, op.Constant(value_ints=[1]), keepdims=1)
    own_weight = op.ReduceSum(seen * own, op.Constant(value_ints=[3]), keepdims=1)
    others = seen * (op.Constant(value_float=1.0) - own)
    sees_others = op.ReduceMax(others, op.Constant(value_ints=[3]), keepdims=1)
    seen_by_others = op.ReduceMax(others, op.Constant(value_ints=[2]), keepdims=1)
    bond = sees_others + op.ReduceSum(seen_by_others * own, op.Constant(value_ints=[3]), keepdims=1)

    largest = op.ReduceMax(weights, op.Constant(value_ints=[1, 3]), keepdims=1)
    smallest = op.Neg(op.ReduceMax(op.Neg(weights), op.Constant(value_ints=[1, 3]), keepdims=1))
    uneven = (largest - smallest) * op.Cast(keys, to=1) > op.Constant(value_float=1e-5)
    token = op.Or(op.And(bond > none, uneven), keys == one)
    return op.Cast(op.And(own_weight > none, token), to=1)


@script(_domain, default_opset=op)
def AllQueries(P):  # noqa: N802
    """Every query counts: for maps whose queries are not the positions of their keys. [B,H,Q,K] -> [B,1,Q,1]."""
    batch = op.Shape(P, start=0, end=1)
    queries = op.Shape(P, start=2, end=3)
    one = op.Constant(value_ints=[1])
    return op.Expand(op.Constant(value_float=1.0), op.Concat(batch, one, queries, one, axis=0))


@script(_domain, default_opset=op)
def ColumnSummary(P, valid):  # noqa: N802
    """Column features that do not change with padding: `SUMMARIES` per head. P [B,H,Q,K] -> [B,H*8,K].

    Weights are relative to the row's uniform share, `P_ij * n_i`, and only valid queries `[B,1,Q,1]` count. The
    quarters are means over the first, second, ... quarter of a sample's valid queries.
    """
    weights = op.Cast(P, to=1)
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    query_axis = op.Constant(value_ints=[2])
    visible = op.Cast(weights > zero, to=1)
    share = weights * op.ReduceSum(visible, op.Constant(value_ints=[3]), keepdims=1) * valid

    count = op.Max(op.ReduceSum(valid, query_axis, keepdims=1), one)
    rank = op.CumSum(valid, op.Constant(value_int=2)) - valid
    first = op.Cast(rank < op.Constant(value_float=0.5), to=1) * valid
    quarter = op.Floor(rank * op.Constant(value_float=4.0) / count)
    quarters = op.Cast(quarter == op.Constant(value_floats=[0.0, 1.0, 2.0, 3.0]), to=1) * valid
    selection = op.Concat(valid, first, quarters, axis=3)
    selection = selection / op.Max(op.ReduceSum(selection, query_axis, keepdims=1), one)
    means = op.MatMul(op.Transpose(selection, perm=[0, 1, 3, 2]), share)

    maximum = op.ReduceMax(share, query_axis, keepdims=1)
    queries = op.Shape(P, start=2, end=3)
    keys = op.Shape(P, start=3, end=4)
    start = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    own_key = op.Unsqueeze(op.Range(start, op.Squeeze(queries), step) + (keys - queries), op.Constant(value_ints=[1]))
    columns = op.Unsqueeze(op.Range(start, op.Squeeze(keys), step), op.Constant(value_ints=[0]))
    own = op.ReduceSum(share * op.Cast(own_key == columns, to=1), query_axis, keepdims=1)

    features = op.Concat(means, maximum, own, axis=2)
    return op.Reshape(features, op.Concat(op.Constant(value_ints=[0, -1]), keys, axis=0))


@script(_domain, default_opset=op)
def DetectorMargin(X, offset, weight_1, bias_1, weight_2, bias_2, direction, threshold):  # noqa: N802
    """How far each column's score is above the threshold. X [B,F,K] -> [B,K].

    The encoder reads the logarithms of the features, whose tails are heavy. It is two layers to a unit-norm embedding;
    the score is the difference of its similarities to the anomalous and the benign prototype,
    `direction = prototype_anomalous - prototype_benign` [1,E]. Columns that no query sees (padding) are far below every
    threshold. offset [1], weight_1 [hidden,F], bias_1 [hidden,1], weight_2 [E,hidden], bias_2 [E,1].
    """
    feature_axis = op.Constant(value_ints=[1])
    hidden = op.Relu(op.MatMul(weight_1, op.Log(X + offset)) + bias_1)
    embedding = op.MatMul(weight_2, hidden) + bias_2
    norm = op.Sqrt(op.ReduceSum(embedding * embedding, feature_axis, keepdims=1) + op.Constant(value_float=1e-12))
    score = op.Squeeze(op.MatMul(direction, embedding) / norm, feature_axis)
    zero = op.Constant(value_float=0.0)
    seen = op.ReduceSum(X, feature_axis, keepdims=0) > zero
    return op.Where(seen, score - op.Where(seen, threshold, zero), op.Constant(value_float=_UNSEEN))


@script(_domain, default_opset=op)
def Reach(margin, reach):  # noqa: N802
    """The threshold lowered by reach [1] for all columns of a sample that has one above it. margin [B,K] -> [B,K].

    Columns that no query sees stay below it: they are farther away than any reach.
    """
    largest = op.ReduceMax(margin, op.Constant(value_ints=[1]), keepdims=1)
    zero = op.Constant(value_float=0.0)
    return margin + op.Where(largest > zero, reach, zero)


@script(_domain, default_opset=op)
def RedistributedMap(P, M, beta):  # noqa: N802
    """P' of design section 5. P [B,H,Q,K], M bool [B,K], beta broadcasts to [B,H,Q,1] -> float [B,H,Q,K]."""
    weights = op.Cast(P, to=1)
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    key_axis = op.Constant(value_ints=[3])
    m = op.Cast(op.Unsqueeze(M, op.Constant(value_ints=[1, 2])), to=1)
    visible = op.Cast(weights > zero, to=1)
    flagged_visible = visible * m
    benign_visible = visible - flagged_visible
    n = op.ReduceSum(visible, key_axis, keepdims=1)
    n_benign = op.ReduceSum(benign_visible, key_axis, keepdims=1)

    mass = op.ReduceSum(weights, key_axis, keepdims=1)
    some_benign = n_benign > zero
    share = mass * op.Where(some_benign, beta, zero) / op.Max(n, one)
    left = mass - share * (n - n_benign)
    R = weights * (one - m)
    r = op.ReduceSum(R, key_axis, keepdims=1)
    some = r > op.Constant(value_float=_TINY)
    scale = op.Where(some, left / op.Where(some, r, one), zero)
    even = op.Where(some, zero, left / op.Max(n_benign, one))
    redistributed = share * flagged_visible + R * scale + benign_visible * even
    return op.Where(some_benign, redistributed, weights)


@script(_domain, default_opset=op)
def NeutralValues(V, M, neutral):  # noqa: N802
    """A flagged token hands over the neutral value. V [B,Hv,K,D], M bool [B,K], neutral [1,Hv,1,D] -> [B,Hv,K,D]."""
    return op.Where(op.Unsqueeze(M, op.Constant(value_ints=[1, 3])), neutral, op.Cast(V, to=1))


@script(_domain, default_opset=op)
def Attend(P, V):  # noqa: N802
    """P V where H / Hv consecutive heads share one head of V. P [B,H,Q,K], V [B,Hv,K,D] -> float [B,H,Q,D]."""
    values = op.Cast(V, to=1)
    kv_heads = op.Shape(V, start=1, end=2)
    keys = op.Shape(P, start=3, end=4)
    grouped = op.Concat(op.Constant(value_ints=[0]), kv_heads, op.Constant(value_ints=[-1]), keys, axis=0)
    output = op.MatMul(op.Reshape(op.Cast(P, to=1), grouped), values)
    depth = op.Shape(V, start=3, end=4)
    return op.Reshape(output, op.Concat(op.Shape(P, start=0, end=3), depth, axis=0))


@script(_domain, default_opset=op)
def MapFlag(M):  # noqa: N802
    """Whether any column of a map is flagged. M bool [B,K] -> bool [B,1,1,1]."""
    count = op.ReduceSum(op.Cast(M, to=1), op.Constant(value_ints=[1]), keepdims=0)
    return op.Unsqueeze(count > op.Constant(value_float=0.0), op.Constant(value_ints=[1, 2, 3]))


@script(_domain, default_opset=op)
def SelectFlagged(repaired, Y, flagged):  # noqa: N802
    """The repaired output where flagged, Y itself, bit for bit, elsewhere; all of one shape, up to broadcasting."""
    return op.Where(flagged, op.CastLike(repaired, Y), Y)


@script(_domain, default_opset=op)
def AnyFlag(M):  # noqa: N802
    """Whether any column of any sample is flagged. M bool [B,K] -> bool scalar."""
    return op.ReduceSum(op.Cast(M, to=1), keepdims=0) > op.Constant(value_float=0.0)


@script(_domain, default_opset=op)
def SampleFlag(M):  # noqa: N802
    """Whether any column of a sample is flagged. M bool [B,K] -> bool [B,1]."""
    return op.ReduceSum(op.Cast(M, to=1), op.Constant(value_ints=[1]), keepdims=1) > op.Constant(value_float=0.0)


@script(_domain, default_opset=op)
def SampleScore(margin):  # noqa: N802
    """A sample's largest margin. [B,K] -> [B,1]."""
    return op.ReduceMax(margin, op.Constant(value_ints=[1]), keepdims=1)


_ALL = (
    WholeColumns,
    ValidQueries,
    AllQueries,
    ColumnSummary,
    DetectorMargin,
    Reach,
    RedistributedMap,
    NeutralValues,
    Attend,
    MapFlag,
    SelectFlagged,
    AnyFlag,
    SampleFlag,
    SampleScore,
)


def local_functions(opset_version: int) -> dict[str, ir.Function]:
    """The functions by name, as model-local functions of a model that imports this opset.

    Args:
        opset_version: The model's version of the ONNX operators, `MIN_OPSET` or later.
    """
    functions = {}
    for definition in _ALL:
        function = ir.from_proto(definition.to_function_proto())
        assert isinstance(function, ir.Function)
        function.opset_imports[""] = opset_version
        if opset_version < 18:
            _axes_as_attribute(function)
        _constants_as_tensors(function)
        functions[function.name] = function
    return functions


def _axes_as_attribute(function: ir.Function) -> None:
    """Before opset 18, ReduceMax took its axes as an attribute."""
    for node in list(function):
        if node.op_type != "ReduceMax":
            continue
        axes = node.inputs[1]
        constant = axes.producer() if axes is not None else None
        assert constant is not None, "our own functions give ReduceMax constant axes"
        node.attributes.add(ir.AttrInt64s("axes", constant.attributes["value_ints"].as_ints()))
        node.resize_inputs(1)
        if not constant.outputs[0].uses():
            function.remove(constant)


def _constants_as_tensors(function: ir.Function) -> None:
    """Every constant as the attribute `value`: onnxslim takes `value_float` and `value_floats` for double."""
    for node in function:
        if node.op_type == "Constant" and "value" not in node.attributes:
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            assert tensor is not None, "a Constant is constant"
            node.attributes.clear()
            node.attributes.add(ir.AttrTensor("value", tensor))
