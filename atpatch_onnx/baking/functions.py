"""The onnxscript functions that probe and patched graphs share: column features, detector, redistribution, edits.

What the detector is fitted on is what it sees when served, because both graphs call these functions. The arithmetic is
that of design section 5; `atpatch_onnx.baking.reference` is the numpy form of it. Shapes are in brackets: B maps,
H heads, Hv heads of the values, Q queries, K keys, D depth, F features. All arithmetic is float32, whatever the model's
precision. Every function runs from opset 15 on; `local_functions` makes them ready for a model's own opset.

Weights that a running service may exchange (`SessionOptions.add_initializer`) meet a value that is computed before they
meet a constant, and never stand alone in a sum or a product: optimizers fold constants, and drop `+ 0` and `* 1`, by
what the file says.
"""

import onnx
import onnx_ir as ir
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from atpatch_onnx.graph.names import DOMAIN, DOMAIN_VERSION

SUMMARIES = ("mean", "first query", "quarter 1", "quarter 2", "quarter 3", "quarter 4", "maximum", "own query")
"""The per-head column features of `ColumnSummary`, in order."""

LANDMARKS = 8
"""How many queries `LandmarkQueries` picks."""

_domain = Opset(DOMAIN, DOMAIN_VERSION)
_UNSEEN = -8.0


def _row(number: float) -> onnx.TensorProto:
    """A number to go with rows `[B,H,Q,1]`.

    Where a tensor ends with an axis of 1, onnxruntime's CPU kernels take ten times as long with a number of fewer axes.
    """
    return onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [1, 1, 1, 1], [number])


_ZERO, _ONE, _TINY = _row(0.0), _row(1.0), _row(1e-30)


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
def ProbedQueries(X):  # noqa: N802
    """32 queries, evenly spaced from the first to the last. X [B,H,Q,any] -> int64 [32]."""
    first = op.Constant(value_int=0)
    count = op.Constant(value_int=32)
    step = op.Constant(value_int=1)
    last = op.Shape(X, start=2, end=3) - op.Constant(value_ints=[1])
    return op.Range(first, count, step) * last / op.Constant(value_ints=[31])


@script(_domain, default_opset=op)
def LandmarkQueries(R, probes):  # noqa: N802
    """Eight of the queries of self-attention that are tokens, evenly spaced from the first to the last of them.

    Rows of the probed queries [B,H,32,K], int64 [32] -> int64 [B,8]. Reading all of a long map costs more than a
    hundredth of the layer. So a key counts as a token's if any of 32 rows sees it, evenly spaced from the first row to
    the last. Of these rows, those of padding do not count (see `ValidQueries`). That finds every token under padding
    masks and causal ones. It misses some where windows are shorter than the 31st part of a sequence.
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_float=0.0)
    queries = op.Slice(probes, op.Constant(value_ints=[31]), op.Constant(value_ints=[32])) + one
    keys = op.Shape(R, start=3, end=4)
    seen = op.ReduceMax(op.Cast(R, to=1), one, keepdims=0)
    columns = op.Range(op.Constant(value_int=0), op.Squeeze(keys), op.Constant(value_int=1))
    own = op.Unsqueeze(probes + (keys - queries), one) == op.Unsqueeze(columns, op.Constant(value_ints=[0]))
    key_axis = op.Constant(value_ints=[2])
    sees_others = op.ReduceMax(op.Where(own, zero, seen), key_axis, keepdims=1) > zero
    largest = op.ReduceMax(seen, key_axis, keepdims=1)
    smallest = op.Neg(op.ReduceMax(op.Neg(seen), key_axis, keepdims=1))
    uneven = (largest - smallest) * op.Cast(keys, to=1) > op.Constant(value_float=1e-5)
    token = op.Or(op.And(sees_others, uneven), keys == one)
    known = op.ReduceMax(op.Where(token, seen, zero), one, keepdims=0)
    valid = op.Cast(op.Slice(known, keys - queries, keys, one) > zero, to=7)
    rank = op.CumSum(valid, op.Constant(value_int=1)) - valid
    last = op.Max(op.ReduceSum(valid, one, keepdims=1) - one, op.Constant(value_ints=[0]))
    wanted = (op.Constant(value_ints=[0, 2, 4, 6, 8, 10, 12, 14]) * last + op.Constant(value_ints=[7])) / op.Constant(
        value_ints=[14]
    )
    found = op.And(
        op.Unsqueeze(wanted, key_axis) == op.Unsqueeze(rank, one), op.Unsqueeze(valid > op.Constant(value_int=0), one)
    )
    return op.ArgMax(op.Cast(found, to=1), axis=2, keepdims=0)


@script(_domain, default_opset=op)
def LandmarkRows(X, landmarks):  # noqa: N802
    """Where the rows of these queries are in X [B or 1,H,Q,any], all axes but the last one flat.

    int64 [B,8] -> int64 [B,H,8].
    """
    first = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    queries = op.Shape(X, start=2, end=3)
    heads = op.Shape(X, start=1, end=2)
    maps = op.Shape(X, start=0, end=1) * heads
    starts = op.Range(first, op.Squeeze(maps), step) * queries
    of_heads = op.Reshape(starts, op.Concat(op.Constant(value_ints=[-1]), heads, op.Constant(value_ints=[1]), axis=0))
    return of_heads + op.Unsqueeze(landmarks, op.Constant(value_ints=[1]))


@script(_domain, default_opset=op)
def RowsAt(X, rows):  # noqa: N802
    """The rows of each sample's landmarks. X [B or 1,H,Q,any], int64 [B,H,8] -> [B,H,8,any], of the type of X."""
    return op.Gather(op.Flatten(X, axis=3), rows, axis=0)


@script(_domain, default_opset=op)
def LandmarkColumns(R):  # noqa: N802
    """Column features from a few rows. [B,H,8,K] -> [B,H*8,K].

    Weights are relative to the row's uniform share, `P_ij * n_i`. The Reshape is for onnx 1.23 as well: it infers 0
    keys for the map of an op `Attention` of free length, and runtimes plan memory by that.
    """
    weights = op.Cast(R, to=1)
    visible = op.Cast(weights > op.Constant(value_float=0.0), to=1)
    shares = weights * op.ReduceSum(visible, op.Constant(value_ints=[3]), keepdims=1)
    keys = op.Shape(R, start=3, end=4)
    return op.Reshape(shares, op.Concat(op.Constant(value_ints=[0, -1]), keys, axis=0))


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
    norm = op.Max(op.ReduceL2(embedding, feature_axis, keepdims=1), op.Constant(value_float=1e-6))
    score = op.Squeeze(op.MatMul(direction, embedding) / norm, feature_axis)
    zero = op.Constant(value_float=0.0)
    each = op.Expand(op.Constant(value_float=1.0), op.Shape(weight_1, start=1, end=2))
    seen = op.MatMul(each, X) > zero  # a sum over features that is quicker than ReduceSum
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
def Visible(P):  # noqa: N802
    """1 where a query sees a key, 0 elsewhere. P [B,H,Q,K] -> float [B,H,Q,K]."""
    return op.Cast(op.Cast(P, to=1) > op.Constant(value_float=0.0), to=1)


@script(_domain, default_opset=op)
def VisibleOfSoftmax(P):  # noqa: N802
    """As `Visible` where no weight is above 1, in a third of the time. P [B,H,Q,K] -> float [B,H,Q,K]."""
    return op.Ceil(op.Cast(P, to=1))


@script(_domain, default_opset=op)
def CountColumns(M):  # noqa: N802
    """What `Visible` is multiplied with to count keys, all and flagged ones. M bool [B,K] -> float [B,1,K,2]."""
    m = op.Cast(op.Unsqueeze(M, op.Constant(value_ints=[1, 3])), to=1)
    return op.Concat(op.Max(m, op.Constant(value_float=1.0)), m, axis=3)


@script(_domain, default_opset=op)
def SomeHidden(P):  # noqa: N802
    """Whether any query does not see a key. P [B,H,Q,K] -> bool scalar."""
    smallest = op.ReduceMin(op.Cast(P, to=1), op.Constant(value_ints=[3]), keepdims=1)  # of rows first: it is quicker
    return op.ReduceMin(smallest, op.Constant(value_ints=[0, 1, 2, 3]), keepdims=0) <= op.Constant(value_float=0.0)


@script(_domain, default_opset=op)
def CountAll(columns):  # noqa: N802
    """The counts of a query that sees every key, from `CountColumns`. [B,1,K,2] -> [B,1,1,2]."""
    return op.ReduceSum(columns, op.Constant(value_ints=[2]), keepdims=1)


@script(_domain, default_opset=op)
def Mass(P):  # noqa: N802
    """The mass of each row. P [B,H,Q,K] -> float [B,H,Q,1]."""
    return op.ReduceSum(op.Cast(P, to=1), op.Constant(value_ints=[3]), keepdims=1)


@script(_domain, default_opset=op)
def MassOfSoftmax(counts):  # noqa: N802
    """As `Mass`, up to rounding, where a softmax made the map: 1 if a query sees any key. [...,2] -> float [...,1]."""
    visible, _ = op.Split(counts, op.Constant(value_ints=[1, 1]), axis=3)
    return op.Min(visible, op.Constant(value=_ONE))


@script(_domain, default_opset=op)
def BenignColumn(M):  # noqa: N802
    """What a map is multiplied with to sum the weights of benign keys. M bool [B,K] -> float [B,1,K,1]."""
    return op.Constant(value_float=1.0) - op.Cast(op.Unsqueeze(M, op.Constant(value_ints=[1, 3])), to=1)


@script(_domain, default_opset=op)
def BenignValues(V, M):  # noqa: N802
    """The values of benign keys, zero for the others. V [B,Hv,K,D], M bool [B,K] -> float [B,Hv,K,D]."""
    m = op.Cast(op.Unsqueeze(M, op.Constant(value_ints=[1, 3])), to=1)
    return op.Cast(V, to=1) * (op.Constant(value_float=1.0) - m)


@script(_domain, default_opset=op)
def FlaggedValues(V, M):  # noqa: N802
    """The values of flagged keys, zero for the others. V [B,Hv,K,D], M bool [B,K] -> float [B,Hv,K,D]."""
    return op.Cast(V, to=1) * op.Cast(op.Unsqueeze(M, op.Constant(value_ints=[1, 3])), to=1)


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
def NeutralHanded(P, M, neutral):  # noqa: N802
    """What flagged tokens hand over: the neutral value. P [B,H,Q,K], M bool [B,K], neutral [1,Hv,1,D] -> [B,H,1,D].

    0 where none is flagged.
    """
    count = op.ReduceSum(op.Cast(M, to=1), op.Constant(value_ints=[1]), keepdims=0)
    zero = op.Constant(value_float=0.0)
    some = op.Unsqueeze(count, op.Constant(value_ints=[1, 2, 3])) > zero
    handed = op.Where(some, neutral, zero)
    one = op.Constant(value_ints=[1])
    depth = op.Shape(neutral, start=3, end=4)
    heads = op.Shape(P, start=1, end=2)
    groups = heads / op.Shape(neutral, start=1, end=2)
    each = op.Expand(op.Unsqueeze(handed, op.Constant(value_ints=[2])), op.Concat(one, one, groups, one, one, axis=0))
    return op.Reshape(each, op.Concat(op.Constant(value_ints=[0]), heads, one, depth, axis=0))


@script(_domain, default_opset=op)
def OwnHanded(flagged, counts):  # noqa: N802
    """What flagged tokens hand over: the mean of their own values.

    flagged = `Visible @ FlaggedValues` [B,H,Q,D], counts = `Visible @ CountColumns` [B,H,Q,2] -> [B,H,Q,D].
    """
    _, count = op.Split(counts, op.Constant(value_ints=[1, 1]), axis=3)
    return flagged / op.Max(count, op.Constant(value=_ONE))


@script(_domain, default_opset=op)
def Redistributed(benign, mass, r, counts, beta, handed):  # noqa: N802
    """Y' = P' V' of design section 5, from sums over keys: no map of its size is written.

    With s the mass of a row, r its benign mass, R V what benign keys bring, and t = beta * flagged / visible keys,
    `Y' = s ((1 - t) R V / r + t handed)`. benign = `P @ BenignValues` [B,H,Q,D], r = `P @ BenignColumn` [B,H,Q,1],
    counts = `Visible @ CountColumns` [B,H,Q,2] or `CountAll` [B,1,1,2], mass = `Mass` or `MassOfSoftmax`, mass and beta
    broadcast to [B,H,Q,1], handed to [B,H,Q,D] -> float [B,H,Q,D]. A row that sees flagged keys only keeps its weights,
    so all that it gets is handed; tokens that hand over their own values need `SomeBenign` there. A row that sees none
    gets what benign keys bring, bit for bit: times 1, minus 0, which changes no number, while -0 plus 0 is 0.
    """
    zero = op.Constant(value=_ZERO)
    one = op.Constant(value=_ONE)
    visible, count = op.Split(counts, op.Constant(value_ints=[1, 1]), axis=3)
    some = r > op.Constant(value=_TINY)
    t = op.Where(some, count / op.Max(visible, one) * op.Where(some, beta, zero), one)
    kept = op.Where(count > zero, mass * (one - t) / op.Where(some, r, one), one)
    return benign * kept - handed * (zero - mass * t)


@script(_domain, default_opset=op)
def SomeBenign(r):  # noqa: N802
    """Which rows see a benign key, from `P @ BenignColumn`. [B,H,Q,1] -> bool [B,H,Q,1]."""
    return r > op.Constant(value=_TINY)


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
def EditUnits(h, edited, factor, constant):  # noqa: N802
    """Hidden units as a neuron edit makes them: `factor h + constant` where edited, bit for bit `h` elsewhere.

    h [...,units]; edited bool [units], factor and constant float [units].
    """
    return op.Where(edited, op.CastLike(op.Cast(h, to=1) * factor + constant, h), h)


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
    ProbedQueries,
    LandmarkQueries,
    LandmarkRows,
    RowsAt,
    LandmarkColumns,
    DetectorMargin,
    Reach,
    Visible,
    VisibleOfSoftmax,
    CountColumns,
    SomeHidden,
    CountAll,
    Mass,
    MassOfSoftmax,
    BenignColumn,
    BenignValues,
    FlaggedValues,
    Attend,
    NeutralHanded,
    OwnHanded,
    Redistributed,
    SomeBenign,
    MapFlag,
    SelectFlagged,
    AnyFlag,
    EditUnits,
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
    """Before opset 18, reductions other than ReduceSum took their axes as an attribute."""
    for node in list(function):
        if node.op_type not in ("ReduceMax", "ReduceMin", "ReduceL2"):
            continue
        axes = node.inputs[1]
        constant = axes.producer() if axes is not None else None
        assert constant is not None, "our own functions give reductions constant axes"
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
