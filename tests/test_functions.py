"""The onnxscript functions against numpy, in onnxruntime and in onnx's reference evaluator, at every opset we support.

The features are recomputed here position by position, in float64 and with loops: slow, and unlike the functions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_of
from models import IR_OF_OPSET, draw_detector, run
from onnx.reference import ReferenceEvaluator

from atpatch_onnx.baking import functions
from atpatch_onnx.baking import reference as redistribution
from atpatch_onnx.baking.weave import folded
from atpatch_onnx.matching.sites import AttentionSite, Form
from atpatch_onnx.patches.patch import OFFSET

OPSETS = (15, 17, 18, 23, 24, 26)
"""26 is the last that onnxruntime 1.31 accepts."""

BOOLEAN = ("AnyFlag", "MapFlag", "SampleFlag", "SomeBenign", "SomeHidden")
RESULTS = {
    **dict.fromkeys(BOOLEAN, ir.DataType.BOOL),
    **dict.fromkeys(("ProbedQueries", "LandmarkQueries", "LandmarkRows"), ir.DataType.INT64),
}
"""Types of results that are not float."""

TOLERANCE = 1e-5
"""float32 against float64: about 50 roundings of numbers of the size of one; the maps have at most nine columns."""

drawn = settings(max_examples=12, deadline=None, derandomize=True)

Run = Callable[..., np.ndarray]


def model_of(name: str, opset: int, arrays: tuple[np.ndarray, ...]) -> onnx.ModelProto:
    """A model that calls one function; ranks are fixed, sizes are free."""
    ranks = [f"{name}{opset}"]
    inputs = [
        ir.Value(
            name=f"input_{number}",
            shape=ir.Shape([f"n{number}_{axis}" for axis in range(array.ndim)]),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for number, array in enumerate(arrays)
    ]
    node = ir.Node(functions.DOMAIN, name, inputs, name="call")
    result = node.outputs[0]
    result.name = "result"
    result.dtype = RESULTS.get(name, ir.DataType.FLOAT)
    graph = ir.Graph(inputs, [result], nodes=[node], name=ranks[0], opset_imports={"": opset, functions.DOMAIN: 1})
    function = functions.local_functions(opset)[node.op_identifier()[1]]
    model = ir.Model(graph, ir_version=IR_OF_OPSET[opset], functions=[function])
    proto = ir.to_proto(model)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


def in_onnxruntime(name: str, opset: int, *arrays: np.ndarray) -> np.ndarray:
    feed = {f"input_{number}": array for number, array in enumerate(arrays)}
    return run(model_of(name, opset, arrays), feed)["result"]


def in_reference(name: str, opset: int, *arrays: np.ndarray) -> np.ndarray:
    feed = {f"input_{number}": array for number, array in enumerate(arrays)}
    return np.asarray(ReferenceEvaluator(model_of(name, opset, arrays)).run(None, feed)[0])


ENGINES = {"onnxruntime": in_onnxruntime, "reference": in_reference}

everywhere = pytest.mark.parametrize("engine", ENGINES)
at_every_opset = pytest.mark.parametrize("opset", OPSETS)


@dataclass(frozen=True)
class Draw:
    P: np.ndarray
    M: np.ndarray
    V: np.ndarray
    beta: np.ndarray
    neutral: np.ndarray


@st.composite
def draws(draw: st.DrawFn, *, square: bool = False) -> Draw:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    keys, depth = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    queries = keys if square else draw(st.integers(1, 5))
    heads = kv_heads * groups
    hidden = rng.random((batch, 1, queries, keys)) < draw(st.sampled_from([0.0, 0.4]))
    weights = np.where(hidden, 0, np.exp(rng.normal(size=(batch, heads, queries, keys))))
    sums = weights.sum(-1, keepdims=True)
    P = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
    if draw(st.booleans()):  # rows behind a gate or an attention sink do not sum to one
        P *= rng.uniform(0.2, 2, size=(batch, heads, queries, 1))
    profile = (
        rng.random((heads, queries, 1))
        if draw(st.booleans())
        else np.full((1, 1, 1), draw(st.sampled_from([0.0, 0.5, 1.0])))
    )
    return Draw(
        P=P.astype(np.float32),
        M=rng.random((batch, keys)) < draw(st.sampled_from([0.0, 0.3, 0.9])),
        V=rng.normal(size=(batch, kv_heads, keys, depth)).astype(np.float32),
        beta=profile.astype(np.float32),
        neutral=rng.normal(size=(kv_heads, depth)).astype(np.float32),
    )


def repaired(engine: str, opset: int, d: Draw, *, own: bool = False) -> np.ndarray:
    """Y' as `emission.repair_output` composes it of the functions, Y itself where nothing is flagged."""
    call = ENGINES[engine]
    Y = redistribution.attend(d.P, d.V).astype(np.float32)
    chosen = call("MapFlag", opset, d.M)
    assert np.array_equal(chosen.reshape(-1), d.M.any(-1))
    assert chosen.shape == (len(d.M), 1, 1, 1)
    benign = call("Attend", opset, d.P, call("BenignValues", opset, d.V, d.M))
    mass, r = call("Mass", opset, d.P), call("Attend", opset, d.P, call("BenignColumn", opset, d.M))
    visible = call("Visible", opset, d.P)
    if d.P.max() <= 1:
        assert np.array_equal(visible, call("VisibleOfSoftmax", opset, d.P))
    columns = call("CountColumns", opset, d.M)
    counts = visible @ columns
    hidden = call("SomeHidden", opset, d.P)
    assert hidden.shape == ()
    assert hidden == (d.P == 0).any()
    if not hidden:
        every = call("CountAll", opset, columns)
        assert np.array_equal(np.broadcast_to(every, counts.shape), counts)
        counts = every if not own else counts
    gated = not np.allclose(d.P.sum(-1), (d.P > 0).any(-1))
    if not gated:
        np.testing.assert_allclose(call("MassOfSoftmax", opset, counts) + np.zeros_like(mass), mass, atol=1e-6)
        mass = call("MassOfSoftmax", opset, counts)
    if own:
        flagged = call("Attend", opset, visible, call("FlaggedValues", opset, d.V, d.M))
        handed = call("OwnHanded", opset, flagged, counts)
        chosen = chosen & call("SomeBenign", opset, r)
    else:
        handed = call("NeutralHanded", opset, d.P, d.M, d.neutral[None, :, None])
    found = call("Redistributed", opset, benign, mass, r, counts, d.beta, handed)
    if not own and not gated:  # benign itself, bit for bit, in rows that see no flagged key
        quiet = ~((d.P > 0) & d.M[:, None, None]).any(-1)
        assert found[quiet].tobytes() == benign[quiet].tobytes()
    return call("SelectFlagged", opset, found, Y, chosen)


@everywhere
@at_every_opset
@pytest.mark.parametrize("own", [False, True], ids=["neutral", "own"])
@drawn
@given(d=draws())
def test_redistribution_equals_the_oracle(engine: str, opset: int, own: bool, d: Draw) -> None:
    found = repaired(engine, opset, d, own=own)
    Y = redistribution.attend(d.P, d.V).astype(np.float32)
    wanted = redistribution.redistributed_output(d.P, d.V, Y, d.M, d.beta, None if own else d.neutral)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    quiet = ~d.M.any(-1)
    assert np.array_equal(found[quiet], Y[quiet])


@everywhere
@at_every_opset
@pytest.mark.parametrize("mass", [1e-10, 1e-20, 1e-29])
def test_benign_mass_that_has_all_but_vanished_divides_well(engine: str, opset: int, mass: float) -> None:
    """By hand: of the row, 0.2 stay with the neutral value 4, and 0.8 go to the values 1 and 2 as 1 to 3."""
    P = np.array([1, mass, 3 * mass, 0], np.float32).reshape(1, 1, 1, 4)
    d = Draw(
        P=P,
        M=np.array([[True, False, False, False]]),
        V=np.array([99, 1, 2, 99], np.float32).reshape(1, 1, 4, 1),
        beta=np.full((1, 1, 1), 0.6, np.float32),
        neutral=np.array([[4]], np.float32),
    )
    np.testing.assert_allclose(repaired(engine, opset, d).item(), 0.2 * 4 + 0.2 * 1 + 0.6 * 2, rtol=0, atol=TOLERANCE)


@everywhere
@at_every_opset
def test_what_benign_values_bring_keeps_its_bits_where_nothing_is_flagged(engine: str, opset: int) -> None:
    """Minus zero and infinity as well, which adding zero or choosing by a product would change."""
    call = ENGINES[engine]
    benign = np.array([-0.0, 0.0, -np.inf, 1e-45], np.float32).reshape(1, 1, 1, 4)
    M = np.zeros((1, 5), bool)
    P = np.full((1, 1, 1, 5), 0.2, np.float32)
    handed = call("NeutralHanded", opset, P, M, np.array([-3, 3, 3, np.inf], np.float32).reshape(1, 1, 1, 4))
    rows = np.full((1, 1, 1, 1), 0.999, np.float32)
    counts, beta = np.array([5, 0], np.float32).reshape(1, 1, 1, 2), np.ones((1, 1, 1), np.float32)
    found = call("Redistributed", opset, benign, rows, rows / 3, counts, beta, handed)
    assert found.tobytes() == benign.tobytes()


@everywhere
@at_every_opset
def test_monitors_and_whole_columns(engine: str, opset: int) -> None:
    call = ENGINES[engine]
    M = np.array([[False, False, False], [False, True, True]])
    assert np.array_equal(call("SampleFlag", opset, M), [[False], [True]])
    assert call("AnyFlag", opset, M).item() is True
    assert call("AnyFlag", opset, M[:1]).item() is False
    margin = np.array([[0.5, -1, 0.25], [-8, -2, -3]], np.float32)
    assert np.array_equal(call("SampleScore", opset, margin), np.array([[0.5], [-2]], np.float32))
    Y = np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2)
    P = np.zeros((2, 3, 4, 5), np.float32)
    assert np.array_equal(call("AllQueries", opset, P), np.ones((2, 1, 4, 1)))
    assert np.array_equal(call("WholeColumns", opset, Y), Y.reshape(2, 12, 2))


def summaries(P: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`ColumnSummary` column by column: `[batch, heads * 8, keys]`."""
    P = P.astype(np.float64)
    batch, heads, queries, keys = P.shape
    features = np.zeros((batch, heads, 8, keys))
    for b in range(batch):
        rows = [i for i in range(queries) if valid[b, 0, i, 0]]
        for h in range(heads):
            for j in range(keys):
                share = {i: P[b, h, i, j] * np.count_nonzero(P[b, h, i]) for i in rows}
                quarters: list[list[float]] = [[], [], [], []]
                for rank, i in enumerate(rows):
                    quarters[rank * 4 // len(rows)].append(share[i])
                own = j - (keys - queries)
                features[b, h, :, j] = [
                    np.mean(list(share.values())) if rows else 0,
                    share[rows[0]] if rows else 0,
                    *(np.mean(quarter) if quarter else 0 for quarter in quarters),
                    max(share.values(), default=0),
                    share.get(own, 0),
                ]
    return features.reshape(batch, heads * 8, keys)


@everywhere
@at_every_opset
@drawn
@given(d=draws(), seed=st.integers(0, 2**32 - 1))
def test_column_summaries(engine: str, opset: int, d: Draw, seed: int) -> None:
    batch, _, queries, _ = d.P.shape
    valid = (np.random.default_rng(seed).random((batch, 1, queries, 1)) < 0.7).astype(np.float32)
    found = ENGINES[engine]("ColumnSummary", opset, d.P, valid)
    np.testing.assert_allclose(found, summaries(d.P, valid), rtol=0, atol=TOLERANCE)


@everywhere
@at_every_opset
@drawn
@given(seed=st.integers(0, 2**32 - 1), keys=st.integers(1, 6))
def test_margins_of_columns(engine: str, opset: int, seed: int, keys: int) -> None:
    """The score is a difference of cosines of standardised logarithms; columns that no query sees are never flagged."""
    rng = np.random.default_rng(seed)
    count = 8
    detector = draw_detector(rng, count, threshold=0.25)
    X = abs(rng.normal(size=(2, count, keys))).astype(np.float32)
    X[0, :, 0] = 0
    arrays = [np.asarray(array, np.float32) for array in folded(detector, SITE).values()]
    found = ENGINES[engine]("DetectorMargin", opset, X, *arrays, np.array([detector.threshold], np.float32))
    standardised = (np.log(X.astype(float) + OFFSET) - detector.mean) / detector.scale
    hidden = np.maximum(detector.weight_1 @ standardised + detector.bias_1, 0)
    embedding = detector.weight_2 @ hidden + detector.bias_2
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    benign, anomalous = (np.einsum("e,bek->bk", prototype, embedding) for prototype in detector.prototypes)
    wanted = anomalous - benign - detector.threshold
    wanted[0, 0] = -8
    # scores are of the size of one, but the folded first layer adds numbers of the size of ten
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@everywhere
@at_every_opset
@drawn
@given(
    margins=arrays_of(np.float32, (3, 5), elements=st.floats(-2, 2, width=32)),
    reach=st.floats(0, 4, width=32),
)
def test_reach(engine: str, opset: int, margins: np.ndarray, reach: float) -> None:
    """A sample with a column above the threshold has a lower one for all; unseen columns stay below it."""
    margins[:, 0] = -8
    found = ENGINES[engine]("Reach", opset, margins, np.array([reach], np.float32))
    flagged = (margins > 0).any(axis=1, keepdims=True)
    np.testing.assert_array_equal(found, np.where(flagged, margins + np.float32(reach), margins))
    assert (found[:, 0] < 0).all()


SITE = AttentionSite(
    name="site",
    index=0,
    form=Form.SOFTMAX,
    map="P",
    value="V",
    output="Y",
    map_layout="nhqk",
    value_layout="nhkd",
    output_layout="nhqd",
    parts=1,
    heads=1,
    kv_heads=1,
    queries=4,
    keys=4,
    depth=2,
    dtype="FLOAT",
    masked=False,
    self_attention=True,
    token_axis="axis",
    nodes=(),
)


def softmax(scores: np.ndarray) -> np.ndarray:
    """As a runtime computes it in float32: NaN where a row is -inf throughout."""
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@everywhere
def test_valid_queries(engine: str) -> None:
    """Right and left padding by two of five positions, masked with finfo.min and with -inf; a lone token is valid."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    real = {"right": slice(0, 3), "left": slice(2, 5)}
    causal = np.tril(np.ones((5, 5), bool))
    for side, tokens in real.items():
        wanted = np.zeros((1, 1, 5, 1))
        wanted[:, :, tokens] = 1
        for allowed in (np.ones((5, 5), bool), causal):
            visible = allowed.copy()
            padded = np.ones(5, bool)
            padded[tokens] = False
            visible[:, padded] = False
            finite = softmax(np.where(visible, scores, np.finfo(np.float32).min))
            infinite = np.nan_to_num(softmax(np.where(visible, scores, -np.inf)), nan=0.0)
            for P in (finite, infinite):
                found = ENGINES[engine]("ValidQueries", 18, P)
                assert np.array_equal(found, wanted), f"{side}: {found.ravel()}"
    assert ENGINES[engine]("ValidQueries", 18, np.ones((1, 2, 1, 1), np.float32)).item() == 1


@everywhere
def test_evenly_masked_rows_of_half_precision_are_no_tokens(engine: str) -> None:
    """In float16 a uniform row over seven keys is not 1/7 exactly: it must be told from a token's row all the same."""
    P = np.zeros((1, 12, 7, 7), np.float16)
    P[..., :2, :] = np.float16(1 / 7)  # two padded queries on the left: finfo.min throughout, so the row is uniform
    scores = np.random.default_rng(0).normal(size=(1, 12, 5, 5))
    P[..., 2:, 2:] = softmax(np.where(np.tril(np.ones((5, 5), bool)), scores, -1e30))
    found = ENGINES[engine]("ValidQueries", 18, P)
    assert np.array_equal(found.ravel(), [0, 0, 1, 1, 1, 1, 1])


@everywhere
def test_queries_that_see_only_themselves_and_are_seen_by_none_are_no_tokens(engine: str) -> None:
    """Some masks let padding attend to itself, so that no row is empty."""
    scores = np.random.default_rng(0).normal(size=(1, 2, 5, 5))
    for padded in ([0, 1], [3, 4]):
        for allowed in (np.ones((5, 5), bool), np.tril(np.ones((5, 5), bool))):
            visible = allowed.copy()
            visible[:, padded] = False
            visible[padded, :] = False
            visible[padded, padded] = True
            P = softmax(np.where(visible, scores, -1e30))
            wanted = np.ones(5)
            wanted[padded] = 0
            found = ENGINES[engine]("ValidQueries", 18, P)
            assert np.array_equal(found.ravel(), wanted), (padded, found.ravel())


def landmark_queries(tokens: list[int]) -> list[int]:
    """Eight of these positions, evenly spaced by rank, halves rounded up."""
    return [tokens[(2 * i * (len(tokens) - 1) + 7) // 14] for i in range(functions.LANDMARKS)]


def masked_map(rng: np.random.Generator, visible: np.ndarray, lowest: float) -> np.ndarray:
    """A map of two heads in which masked scores are `lowest`: rows without a visible key come out uniform, or zero."""
    scores = rng.normal(size=(2, *visible.shape)) * 3
    return np.nan_to_num(softmax(np.where(visible, scores, lowest).astype(np.float32)))[None]


def found_landmarks(engine: str, P: np.ndarray) -> list[list[int]]:
    probes = ENGINES[engine]("ProbedQueries", 18, P)
    assert probes.tolist() == [i * (P.shape[2] - 1) // 31 for i in range(32)]
    return ENGINES[engine]("LandmarkQueries", 18, P[:, :, probes], probes).tolist()


@everywhere
@pytest.mark.parametrize("lowest", [np.finfo(np.float32).min, -np.inf], ids=["uniform rows", "empty rows"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("count", "length"), [(2, 2), (3, 9), (9, 40), (33, 90), (80, 200)])
def test_landmarks_are_spread_over_the_tokens_whatever_the_padding(engine, lowest, causal, side, count, length) -> None:
    """Keys that are padding are masked for every query, as exporters write it; padded queries see what they may."""
    tokens = list(range(count)) if side == "right" else list(range(length - count, length))
    allowed = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    allowed[:, [position for position in range(length) if position not in tokens]] = False
    P = masked_map(np.random.default_rng(0), allowed, lowest)
    assert found_landmarks(engine, P) == [landmark_queries(tokens)]


@everywhere
def test_landmarks_of_a_lone_token_and_of_a_step_with_a_past(engine: str) -> None:
    assert found_landmarks(engine, np.ones((1, 2, 1, 1), np.float32)) == [[0] * 8]
    last = masked_map(np.random.default_rng(0), np.ones((1, 12), bool), -np.inf)
    assert found_landmarks(engine, last) == [[0] * 8]


@everywhere
@at_every_opset
@drawn
@given(d=draws(square=True), seed=st.integers(0, 2**32 - 1))
def test_columns_at_the_landmarks(engine: str, opset: int, d: Draw, seed: int) -> None:
    batch, heads, queries, keys = d.P.shape
    landmarks = np.random.default_rng(seed).integers(queries, size=(batch, functions.LANDMARKS))
    places = ENGINES[engine]("LandmarkRows", opset, d.P, landmarks)
    rows = ENGINES[engine]("RowsAt", opset, d.P, places)
    np.testing.assert_array_equal(rows, np.stack([d.P[b][:, landmarks[b]] for b in range(batch)]))
    found = ENGINES[engine]("LandmarkColumns", opset, rows)
    share = d.P.astype(np.float64) * np.count_nonzero(d.P, axis=-1, keepdims=True)
    wanted = np.stack([share[b][:, landmarks[b]].reshape(heads * functions.LANDMARKS, keys) for b in range(batch)])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_functions_carry_no_torch_and_no_later_operator() -> None:
    """Every function is accepted by onnx's checker at every opset we support."""
    for opset in OPSETS:
        for function in functions.local_functions(opset).values():
            proto = ir.to_proto(function)
            onnx.checker.check_function(proto, _context(opset))


def _context(opset: int) -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = IR_OF_OPSET[opset]
    context.opset_imports = {"": opset, functions.DOMAIN: functions.DOMAIN_VERSION}
    return context
