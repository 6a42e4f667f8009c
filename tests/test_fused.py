"""com.microsoft's fused attention: its shadow gives the map and the values with which the kernel computes Y."""

import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fused_nets import Seen, add_shadow, fused_model, random_inputs, see
from test_matching_corpus import CORPUS, loader

from atpatch_onnx.errors import BakeError
from atpatch_onnx.matching import explain
from atpatch_onnx.matching.fused import RULE
from atpatch_onnx.matching.sites import Form
from atpatch_onnx.running.sessions import Session

MHA, ATTENTION, GQA = "MultiHeadAttention", "Attention", "GroupQueryAttention"

B, N, S, L, H = 2, 2, 4, 5, 8
"""Samples, heads, queries, keys and depth of `MultiHeadAttention` and `Attention`."""

PAST = 3

TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3}


@dataclass(frozen=True)
class Case:
    """Inputs and attributes of one node."""

    op: str
    feeds: dict[str, np.ndarray]
    attributes: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    """Queries of each sample that are none of its tokens' (a shorter sample's rest); () where all are."""

    tolerance: float | None = None


def floats(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def zeros_and_ones(*shape: int) -> np.ndarray:
    """A mask in which the first key of each row is visible."""
    mask = (floats(*shape, seed=5) > 0).astype(np.int32)
    mask[..., 0] = 1
    return mask


# MultiHeadAttention

SEPARATE = {"query": floats(B, S, N * H), "key": floats(B, L, N * H), "value": floats(B, L, N * H, seed=1)}
PER_HEAD = {"query": floats(B, S, N * H), "key": floats(B, N, L, H), "value": floats(B, N, L, H, seed=1)}
CACHE = {"past_key": floats(B, N, PAST, H), "past_value": floats(B, N, PAST, H, seed=1)}
BIAS = {"bias": floats(3 * N * H)}

PADDINGS = {
    "ends": ints(3, L),
    "ends_and_more": ints(3, L, 0, S, 2 * S, 0, L, 2 * L),
    "keys": np.array([[1, 0, 1, 1, 0], [2, -1, 1, 1, 1]], np.int32),
    "queries_and_keys": zeros_and_ones(B, S, L),
}


def multi_head_cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, feeds: dict[str, np.ndarray], tolerance: float | None = None, **attributes: Any):
        return f"mha_{name}", Case(MHA, feeds, {"num_heads": N, **attributes}, tolerance=tolerance)

    yield case("plain", SEPARATE)
    yield case("scale", SEPARATE, scale=0.7)
    yield case("bias", SEPARATE | BIAS)
    yield case("one_query", SEPARATE | {"query": floats(B, 1, N * H)} | BIAS, unidirectional=1)
    yield case("other_depth", SEPARATE | {"value": floats(B, L, N * 5), "bias": floats(2 * N * H + N * 5)})
    for (name, mask), causal in itertools.product(PADDINGS.items(), (0, 1)):
        yield case(f"mask_{name}_{causal}", SEPARATE | {"key_padding_mask": mask}, unidirectional=causal)
    yield case("mask_filter", SEPARATE | {"key_padding_mask": ints(3, L)}, unidirectional=1, mask_filter_value=-1.0)
    lowest = float(np.finfo(np.float32).min)
    yield case("lowest_filter", SEPARATE | {"key_padding_mask": ints(0, 2)}, mask_filter_value=lowest)
    # scores of 1 beside a filter of -10000 keep three digits
    yield case("nothing_visible", SEPARATE | {"key_padding_mask": ints(0, L)}, 2e-3)
    for batch, heads in itertools.product((1, B), (1, N)):
        yield case(f"attention_bias_{batch}_{heads}", SEPARATE | {"attention_bias": floats(batch, heads, S, L)})
    everything = SEPARATE | BIAS | CACHE | {"attention_bias": floats(1, N, S, PAST + L)}
    everything |= {"key_padding_mask": zeros_and_ones(B, PAST + L)}
    for causal in (0, 1):
        yield case(f"past_{causal}", SEPARATE | CACHE, outputs=3, unidirectional=causal)
        yield case(f"everything_{causal}", everything, outputs=3, unidirectional=causal)
        yield case(f"per_head_{causal}", PER_HEAD, unidirectional=causal)
    yield case("per_head_bias", PER_HEAD | BIAS)
    yield case("per_head_mask", PER_HEAD | {"key_padding_mask": ints(2, L)})


# Attention

PROJECTED = {"input": floats(B, S, 12), "weights": floats(12, 3 * N * H), "bias": floats(3 * N * H)}

MASKS = {
    "ends": ints(3, S),
    "ends_and_starts": ints(3, S, 1, 2),
    "ends_and_more": ints(3, S, 0, S, 2 * S, 0, S, 2 * S),
    "keys": np.array([[1, 0, 1, 1], [1, 1, 1, 0]], np.int32),
    "queries_and_keys": zeros_and_ones(B, S, S),
    "one_column": np.zeros((B, 1), np.int32),
    "one_entry": np.zeros((1, 1), np.int32),
}


def attention_cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, feeds: dict[str, np.ndarray], **attributes: Any):
        return f"attention_{name}", Case(ATTENTION, feeds, {"num_heads": N, **attributes})

    yield case("plain", PROJECTED)
    yield case("weights", PROJECTED, weights=("weights", "bias"))
    yield case("scale", PROJECTED, scale=0.3)
    sizes = [N * H, N * H, N * 3]
    other = {"input": floats(B, S, 12), "weights": floats(12, sum(sizes)), "bias": floats(sum(sizes))}
    yield case("other_depth", other, qkv_hidden_sizes=sizes)
    for (name, mask), causal in itertools.product(MASKS.items(), (0, 1)):
        yield case(f"mask_{name}_{causal}", PROJECTED | {"mask_index": mask}, unidirectional=causal)
    yield case("attention_bias", PROJECTED | {"attention_bias": floats(1, N, S, S)}, unidirectional=1)
    cache = {"past": floats(2, B, N, PAST, H)}
    for causal in (0, 1):
        feeds = PROJECTED | cache | {"mask_index": ints(PAST + 2, PAST + S, 1, 2)}
        yield case(f"past_{causal}", feeds, unidirectional=causal, outputs=2)
    one = cache | {"input": floats(B, 1, 12), "mask_index": zeros_and_ones(B, PAST + 1)}
    yield case("past_one_query", PROJECTED | one, unidirectional=1, outputs=2)


# GroupQueryAttention

HEADS, KV, DEPTH, TOKENS, CAPACITY = 4, 2, 16, 6, 4


def tokens(count: int, samples: int = B, depth: int = DEPTH, kv: int = KV) -> dict[str, np.ndarray]:
    return {
        "query": floats(samples, count, HEADS * depth),
        "key": floats(samples, count, kv * depth, seed=1),
        "value": floats(samples, count, kv * depth, seed=2),
    }


def lengths(*keys: int) -> dict[str, np.ndarray]:
    return {"seqlens_k": ints(*keys) - 1, "total_sequence_length": np.array(max(keys), np.int32)}


def cache(samples: int = B) -> dict[str, np.ndarray]:
    shape = (samples, KV, CAPACITY, DEPTH)
    return {"past_key": floats(*shape, seed=3), "past_value": floats(*shape, seed=4)}


def angles(width: int = DEPTH) -> dict[str, np.ndarray]:
    return {"cos_cache": floats(40, width // 2, seed=5), "sin_cache": floats(40, width // 2, seed=6)}


def positions(samples: int, count: int) -> dict[str, np.ndarray]:
    return {"position_ids": np.random.default_rng(0).integers(0, 40, (samples, count))}


RAGGED = lengths(TOKENS, 4)
PROMPT = tokens(TOKENS) | RAGGED
PACKED = {"query": floats(B, TOKENS, (HEADS + 2 * KV) * DEPTH)} | RAGGED

STEPS = {
    "prompt": PROMPT,
    "prompt_in_buffer": tokens(3) | cache() | lengths(3, 2),
    "next": tokens(1) | cache() | lengths(CAPACITY + 1, CAPACITY + 1),
    "next_ragged": tokens(1) | cache() | lengths(CAPACITY + 1, 3),
    "next_in_buffer": tokens(1) | cache() | lengths(CAPACITY, 2),
    "more": tokens(3, 1) | cache(1) | lengths(CAPACITY + 3),
    "more_in_buffer": tokens(2, 1) | cache(1) | lengths(3),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": 2},
    "wide_window": {"local_window_size": 40},
    "softcap": {"softcap": 1.0},
    "smooth": {"smooth_softmax": 1},
    "smooth_window": {"smooth_softmax": 1, "local_window_size": 2},
    "all": {"causal": 0},
}


def grouped_cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, feeds: dict[str, np.ndarray], kv: int = KV, **attributes: Any):
        queries, ends = feeds["query"].shape[1], feeds["seqlens_k"] + 1
        prompt = queries == feeds["total_sequence_length"]
        rows = tuple(int(end) if prompt else queries for end in ends)
        attributes = {"num_heads": HEADS, "kv_num_heads": kv, "outputs": 3, **attributes}
        return f"gqa_{name}", Case(GQA, feeds, attributes, rows)

    for (step, feeds), (variant, attributes) in itertools.product(STEPS.items(), VARIANTS.items()):
        yield case(f"{step}_{variant}", feeds, **attributes)
    yield case("heads_of_their_own", tokens(TOKENS, kv=HEADS) | RAGGED, kv=HEADS)
    yield case("packed", PACKED)
    yield case("empty_window", PROMPT, local_window_size=0)
    biases = {"bias": {"attention_bias": floats(B, 1, TOKENS, TOKENS)}, "sink": {"head_sink": floats(HEADS)}}
    biases["both"] = {"attention_bias": floats(1, HEADS, TOKENS, TOKENS), "head_sink": floats(HEADS)}
    for (name, added), (variant, attributes) in itertools.product(biases.items(), VARIANTS.items()):
        yield case(f"{name}_{variant}", PROMPT | added, **attributes)
    masks = {"lowest": np.finfo(np.float32).min, "large": -1e30, "half": -65504.0, "infinite": -np.inf}
    for (name, fill), (variant, attributes) in itertools.product(masks.items(), VARIANTS.items()):
        bias = np.zeros((1, 1, TOKENS, TOKENS), np.float32)
        bias[..., :3] = fill  # three rows see nothing
        if not (name == "infinite" and variant in ("softcap", "all")):  # the kernel gives NaN
            yield case(f"mask_{name}_{variant}", PROMPT | {"attention_bias": bias}, **attributes)
    yield case("next_bias", STEPS["next_ragged"] | {"attention_bias": floats(B, 1, 1, CAPACITY + 1)})
    for interleaved in (0, 1):
        rotary = {"do_rotary": 1, "rotary_interleaved": interleaved}
        wide = tokens(TOKENS, depth=2 * DEPTH) | RAGGED
        yield case(f"rotary_packed_{interleaved}", PACKED | angles(), **rotary)
        yield case(f"rotary_part_{interleaved}", wide | angles(DEPTH), **rotary)
        for step, feeds in STEPS.items():
            given = positions(*feeds["query"].shape[:2])
            yield case(f"rotary_{step}_{interleaved}", feeds | angles(), **rotary)
            yield case(f"rotary_given_{step}_{interleaved}", feeds | angles() | given, **rotary)
    for step in ("prompt", "next_ragged"):
        feeds = STEPS[step] | angles()
        halves = {n: array.astype(np.float16) if array.dtype == np.float32 else array for n, array in feeds.items()}
        yield case(f"half_{step}", halves, do_rotary=1)


CASES = dict([*multi_head_cases(), *attention_cases(), *grouped_cases()])


def counted(seen: Seen, case: Case) -> np.ndarray:
    """Rows `[batch, queries]` that belong to a token; what kernels do with others differs from one to the next."""
    queries = np.arange(seen.P.shape[2])
    return queries < np.array(case.rows or [len(queries)] * len(seen.P))[:, None]


@pytest.mark.parametrize(("free", "opset"), [(False, 20), (True, 15), (False, 23)], ids=["known", "free", "opset23"])
@pytest.mark.parametrize("name", CASES)
def test_map_times_values_is_the_output(name: str, free: bool, opset: int) -> None:
    case = CASES[name]
    seen = see(fused_model(case.op, case.feeds, free=free, opset=opset, **case.attributes), case.feeds)
    assert seen.Y is not None
    assert (seen.P.dtype, seen.V.dtype) == (np.float32, np.float32)
    rows = counted(seen, case)
    tolerance = case.tolerance or TOLERANCE[seen.Y.dtype]
    np.testing.assert_allclose(seen.product[rows], seen.Y[rows].astype(np.float32), atol=tolerance)
    assert (seen.P >= 0).all()
    sums = seen.P.sum(-1).transpose(0, 2, 1)[rows]
    if "sink" in name or "smooth" in name or "both" in name or name == "gqa_empty_window":
        assert (sums < 1).all()
    else:
        np.testing.assert_allclose(sums[sums != 0], 1, atol=1e-5)


# What a kernel of the CPU does not run


@pytest.mark.parametrize("bias", [{}, BIAS], ids=["plain", "bias"])
def test_packed_projections_are_as_separate_ones(bias: dict[str, np.ndarray]) -> None:
    q, k, v = (floats(B, S, N, H, seed=seed) for seed in range(3))
    flat = {name: array.reshape(B, S, N * H) for name, array in (("query", q), ("key", k), ("value", v))}
    forms = [{"query": np.stack([q, k, v], axis=3)} | bias]
    if not bias:
        forms.append({"query": flat["query"], "key": np.stack([k, v], axis=3)})
    expected = see(fused_model(MHA, flat | bias, num_heads=N), flat | bias)
    for feeds in forms:
        seen = see(fused_model(MHA, feeds, num_heads=N), feeds, fused=False)
        np.testing.assert_allclose(seen.product, expected.Y, atol=1e-5)


def test_projections_without_bias_are_as_with_zeros() -> None:
    zeros = PROJECTED | {"bias": np.zeros(3 * N * H, np.float32)}
    without = {name: array for name, array in PROJECTED.items() if name != "bias"}
    expected = see(fused_model(ATTENTION, zeros, num_heads=N), zeros)
    seen = see(fused_model(ATTENTION, without, num_heads=N), without, fused=False)
    np.testing.assert_allclose(seen.product, expected.Y, atol=1e-5)


# The map itself


@pytest.mark.parametrize("causal", [0, 1])
def test_padded_and_later_keys_weigh_nothing(causal: int) -> None:
    feeds = SEPARATE | {"key_padding_mask": PADDINGS["keys"]}
    P = see(fused_model(MHA, feeds, num_heads=N, unidirectional=causal), feeds).P
    hidden = np.broadcast_to((PADDINGS["keys"] <= 0)[:, None, None], P.shape).copy()
    if causal:  # the kernel lets the last query see every key
        hidden[:, :, : S - 1] |= np.triu(np.ones((S, L), bool), 1)[: S - 1]
    np.testing.assert_array_equal(P == 0, hidden)


def test_a_sample_sees_its_own_keys_within_the_window() -> None:
    feeds = STEPS["next_ragged"]
    case = fused_model(GQA, feeds, num_heads=HEADS, kv_num_heads=KV, outputs=3, local_window_size=2)
    P = see(case, feeds).P
    assert P.shape == (B, HEADS, 1, CAPACITY + 1)
    np.testing.assert_array_equal(P[0, 0, 0] > 0, [False, False, False, True, True])
    np.testing.assert_array_equal(P[1, 0, 0] > 0, [False, True, True, False, False])


def test_values_are_in_the_order_of_positions() -> None:
    feeds = STEPS["next_ragged"]
    seen = see(fused_model(GQA, feeds, num_heads=HEADS, kv_num_heads=KV, outputs=3), feeds)
    new = feeds["value"].reshape(B, KV, DEPTH)
    np.testing.assert_array_equal(seen.V[0, :, :CAPACITY], feeds["past_value"][0])
    np.testing.assert_array_equal(seen.V[0, :, CAPACITY], new[0])
    np.testing.assert_array_equal(seen.V[1, :, :2], feeds["past_value"][1, :, :2])
    np.testing.assert_array_equal(seen.V[1, :, 2], new[1])


@pytest.mark.parametrize("name", ["mha_everything_1", "attention_past_1", "gqa_rotary_next_ragged_1"])
def test_the_node_stays_and_only_standard_operators_come(name: str) -> None:
    case = CASES[name]
    model = fused_model(case.op, case.feeds, **case.attributes)
    node = model.graph.node(0)
    before = ir.to_proto(node)
    add_shadow(model, node)
    assert ir.to_proto(node) == before
    added = [other for other in model.graph if other is not node]
    assert {other.domain for other in added} == {""}
    assert all(str(other.name).startswith(("atpatch/site/map/", "atpatch/site/values/")) for other in added)
    names = [value.name for other in model.graph for value in other.outputs]
    assert len(set(names)) == len(names)


# The rule


def found(case: Case, **options: Any):
    matches = explain(fused_model(case.op, case.feeds, **case.attributes, **options))
    assert len(matches.sites) + len(matches.near_misses) == 1
    return matches


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "queries", "keys", "depth", "masked"),
    [
        ("mha_plain", N, N, S, L, H, False),
        ("mha_other_depth", N, N, S, L, 5, False),
        ("mha_mask_ends_0", N, N, S, L, H, True),
        ("mha_past_0", N, N, S, PAST + L, H, True),
        ("mha_per_head_0", N, N, S, L, H, False),
        ("mha_per_head_1", N, N, S, L, H, True),
        ("attention_plain", N, N, S, S, H, False),
        ("attention_other_depth", N, N, S, S, 3, False),
        ("attention_past_1", N, N, S, PAST + S, H, True),
        ("gqa_prompt_plain", HEADS, KV, TOKENS, TOKENS, DEPTH, True),
        ("gqa_packed", HEADS, KV, TOKENS, TOKENS, DEPTH, True),
        ("gqa_next_bias", HEADS, KV, 1, CAPACITY + 1, DEPTH, True),
        ("gqa_next_plain", HEADS, KV, 1, None, DEPTH, True),
    ],
)
def test_sites(name: str, heads: int, kv_heads: int, queries: int, keys: int, depth: int, masked: bool) -> None:
    (site,) = found(CASES[name]).sites
    assert (site.form, site.output, site.map) == (Form.FUSED, "Y", None)
    assert (site.heads, site.kv_heads, site.queries, site.keys, site.depth) == (heads, kv_heads, queries, keys, depth)
    assert site.masked is masked


def test_keys_of_symbolic_lengths() -> None:
    (site,) = found(CASES["mha_past_0"], free=True).sites
    assert site.keys == "past_key_2 + key_1"


def test_packed_projections_are_sites() -> None:
    (site,) = found(Case(MHA, {"query": floats(B, S, N, 3, H)}, {"num_heads": N})).sites
    assert (site.queries, site.keys, site.depth, site.value) == (S, S, H, "query")
    feeds = {"query": floats(B, S, N * H), "key": floats(B, L, N, 2, H)}
    (site,) = found(Case(MHA, feeds, {"num_heads": N})).sites
    assert (site.queries, site.keys, site.depth, site.value) == (S, L, H, "key")


GROUPED = {"num_heads": HEADS, "kv_num_heads": KV, "outputs": 3}

NO_KEYS = {"key": floats(B, 0, KV * DEPTH), "value": floats(B, 0, KV * DEPTH)}

REFUSED = {
    "grows": Case(MHA, SEPARATE | CACHE | {"past_length": ints(2)}, {"num_heads": N, "outputs": 3}),
    "unknown form": Case(MHA, {"query": floats(B, S, 3 * N * H)}, {"num_heads": N}),
    "bias beside packed": Case(
        MHA, {"query": floats(B, S, N * H), "key": floats(B, L, N, 2, H)} | BIAS, {"num_heads": N}
    ),
    "mask has 4 axes, where": Case(
        MHA, SEPARATE | {"key_padding_mask": np.ones((B, 1, S, L), np.int32)}, {"num_heads": N}
    ),
    "do_rotary": Case(ATTENTION, PROJECTED, {"num_heads": N, "do_rotary": 1}),
    "buffer": Case(
        ATTENTION,
        PROJECTED | {"past": floats(2, B, N, 8, H), "past_length": ints(3)},
        {"num_heads": N, "past_present_share_buffer": 1, "outputs": 2},
    ),
    "Megatron": Case(ATTENTION, PROJECTED | {"mask_index": np.ones((B, 1, 6, 6), np.int32)}, {"num_heads": N}),
    "drops old keys": Case(GQA, STEPS["next"], {**GROUPED, "sliding_window_cache": 1, "local_window_size": 2}),
    "quantized": Case(GQA, STEPS["next"], {**GROUPED, "k_quant_type": "PER_TENSOR"}),
    "normalizes": Case(GQA, PROMPT | {"q_norm_weight": floats(DEPTH), "k_norm_weight": floats(DEPTH)}, GROUPED),
    "no caches of cosines": Case(GQA, PROMPT, {**GROUPED, "do_rotary": 1}),
    "no keys of its own": Case(GQA, STEPS["next"] | NO_KEYS, GROUPED),
    "not all are given": Case(GQA, {name: a for name, a in PROMPT.items() if name != "value"}, GROUPED),
    "element type is DOUBLE": Case(MHA, {n: a.astype(np.float64) for n, a in SEPARATE.items()}, {"num_heads": N}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str) -> None:
    (miss,) = found(REFUSED[reason]).near_misses
    assert miss.attention
    assert miss.reason.startswith("attention, but ")
    assert reason in miss.reason


def test_operators_whose_map_is_not_computed_are_refused() -> None:
    model = fused_model(MHA, SEPARATE, num_heads=N)
    model.graph.node(0).op_type = "PackedMultiHeadAttention"
    (miss,) = explain(model).near_misses
    assert "fused into com.microsoft::PackedMultiHeadAttention" in miss.reason


# Inputs of which the graph says little


def behind(model: ir.Model, name: str, *nodes: ir.Node) -> ir.Value:
    """Move an input of the one node behind others; their results are not declared."""
    attend = next(node for node in model.graph if node.name == "attend")
    value = nodes[-1].outputs[0]
    value.name = f"{name}_moved"
    attend.replace_input_with([operand and operand.name for operand in attend.inputs].index(name), value)
    for node in nodes:
        model.graph.insert_before(attend, node)
    return value


def test_an_undeclared_mask_is_known_by_what_computes_it() -> None:
    feeds = SEPARATE | {"key_padding_mask": PADDINGS["keys"].clip(0, 1).astype(np.int64)}
    model = fused_model(MHA, feeds, num_heads=N)
    mask = next(value for value in model.graph.inputs if value.name == "key_padding_mask")
    behind(model, "key_padding_mask", ir.Node("", "Cast", [mask], [ir.AttrInt64("to", ir.DataType.INT32)]))
    assert len(explain(model).sites) == 1
    seen = see(model, feeds)
    np.testing.assert_allclose(seen.product, seen.Y, atol=1e-5)


def test_a_mask_of_unknown_axes_is_refused() -> None:
    feeds = SEPARATE | {"key_padding_mask": PADDINGS["keys"]}
    model = fused_model(MHA, feeds, num_heads=N)
    mask = next(value for value in model.graph.inputs if value.name == "key_padding_mask")
    behind(model, "key_padding_mask", ir.Node("", "Abs", [mask]))
    (miss,) = explain(model).near_misses
    assert "how many axes its mask has" in miss.reason
    with pytest.raises(BakeError, match="key_padding_mask_moved"):
        add_shadow(model, next(node for node in model.graph if node.name == "attend"))


# Real exports


def fused_exports() -> Iterator[tuple[str, onnx.ModelProto]]:
    """The corpus graphs that transformers exported with onnxruntime's fusions."""
    fill = loader().fill
    with tarfile.open(CORPUS / "graphs.tar.xz") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".b.onnx") else None
            if content is not None:
                yield member.name, fill(onnx.load_from_string(content.read()))


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of exported graphs does not lie beside the repository")
def test_every_fused_node_of_real_exports() -> None:
    wrong, nodes = {}, 0
    for name, proto in fused_exports():
        model = ir.from_proto(proto)
        fused = [node for node in model.graph if (node.domain, node.op_type) in RULE.anchors]
        if not fused:
            continue
        nodes += len(fused)
        sites = {site.output for site in explain(model).sites if site.form is Form.FUSED}
        assert sites == {node.outputs[0].name for node in fused}
        names = [(*add_shadow(model, node, f"site_{index}"), node.outputs[0]) for index, node in enumerate(fused)]
        dtype = ir.DataType.FLOAT16 if "fp16" in name else ir.DataType.FLOAT
        for *_, Y in names:
            Y.dtype = dtype
            model.graph.outputs.append(Y)
        feeds = random_inputs(proto)
        base, results = Session(ir.from_proto(proto), threads=1).run(feeds), Session(model, threads=1).run(feeds)
        for output, array in base.items():  # the fused kernels keep their numbers
            np.testing.assert_array_equal(results[output], array)
        for P, V, Y in names:
            seen = Seen(results[P], results[V], results[str(Y.name)])
            error = np.abs(seen.product - seen.Y.astype(np.float32)).max()
            if not error < TOLERANCE[seen.Y.dtype] or np.abs(seen.P.sum(-1) - 1).max() > 1e-5:
                wrong[f"{name}: {Y.name}"] = error
    assert nodes == 24
    assert wrong == {}
