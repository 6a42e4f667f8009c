"""com.microsoft's fused attention: whatever a node is given, it attends to neutral keys and values where flagged."""

import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fused_cases import (
    ATTENTION,
    BIAS,
    CACHE,
    CASES,
    DEPTH,
    GQA,
    HEADS,
    KV,
    MHA,
    PROMPT,
    SEPARATE,
    STEPS,
    TOKENS,
    B,
    Case,
    H,
    L,
    N,
    S,
    floats,
    ints,
)
from fused_nets import fused_model, random_inputs
from models import FORMS, draw_patch, fire_on_some, run, same_bits
from nudge import entry_positions
from onnx import helper
from test_matching_corpus import CORPUS, loader

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import explain
from atpatch_onnx.matching.fused import RULE
from atpatch_onnx.matching.sites import AttentionSite, Form
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.patches.patch import Neutral

RUNS = {name: case for name, case in CASES.items() if case.op != ATTENTION}
"""Those that are sites; of `Attention`, which projects keys itself, only the refusal is tested."""


def test_the_operator_that_projects_keys_itself_is_refused_whatever_it_is_given() -> None:
    refused = [name for name, case in CASES.items() if case.op == ATTENTION]
    assert len(refused) > 10
    for name in refused:
        (miss,) = found(CASES[name]).near_misses
        assert miss.attention, name
        assert "it projects queries, keys and values itself; fuse the model without it" in miss.reason


# What a patch does


def rows_of(case: Case, Y: np.ndarray) -> np.ndarray:
    """Rows `[batch, queries]` that belong to a token; what kernels do with others differs from one to the next."""
    queries = np.arange(Y.shape[1])
    return queries < np.array(case.rows or [len(queries)] * len(Y))[:, None]


def neutral_inputs(case: Case, site: AttentionSite, flags: np.ndarray, neutral: Neutral) -> dict[str, np.ndarray]:
    """The node's inputs with neutral keys and values where flagged, by loops."""
    feeds = {name: array.copy() for name, array in case.feeds.items()}
    for place, array in ((site.key, neutral.key), (site.value, neutral.value)):
        own = array.reshape(-1)
        if "bias" in feeds:  # the node adds it to neutral ones as well
            start = site.key.features * (1 if place is site.key else 2)
            own = own - feeds["bias"][start : start + place.features]
        where = entry_positions(place, feeds[place.value].shape, len(flags))
        flat = feeds[place.value].reshape(-1)
        for n, k in zip(*np.nonzero(flags), strict=True):
            flat[where[n, :, k].reshape(-1)] = own
    return feeds


def one_node(case: Case, **options: Any) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Its graph, a bias being a weight of it, and what is fed."""
    weights = case.attributes.get("weights", tuple(name for name in ("bias",) if name in case.feeds))
    model = fused_model(case.op, case.feeds, **{**case.attributes, "weights": weights}, **options)
    return model, {name: array for name, array in case.feeds.items() if name not in weights}


@pytest.mark.parametrize(("free", "opset"), [(False, 20), (True, 15)], ids=["known", "free"])
@pytest.mark.parametrize("name", RUNS)
def test_a_flagged_token_is_to_the_node_what_a_neutral_one_is(name: str, free: bool, opset: int) -> None:
    case = RUNS[name]
    model, feed = one_node(case, free=free, opset=opset)
    (site,) = explain(model).sites
    patch = fire_on_some(model, draw_patch(model), feed, share=0.3)
    base = run(model, feed)["Y"]
    for conditional in FORMS:
        baked = bake(model, patch, conditional=conditional, site_flags=True)
        outputs = run(baked, feed)
        flags = outputs[f"atpatch/{site.name}/flags"]
        assert flags.any()
        neutral = neutral_inputs(case, site, flags, patch.sites[0].neutral)
        wanted = run(model, {key: neutral[key] for key in feed})["Y"]
        rows = rows_of(case, wanted)
        assert same_bits(outputs["Y"][rows], wanted[rows])
        quiet = ~flags.any(axis=1)
        assert same_bits(outputs["Y"][quiet], base[quiet])
        assert same_bits(run(bake(model, draw_patch(model), conditional=conditional), feed)["Y"], base)
        assert fingerprint(unbake(baked)) == fingerprint(model)


@pytest.mark.parametrize("name", ["gqa_more_plain", "gqa_next_ragged_plain", "mha_past_0"])
def test_what_is_cached_of_a_flagged_token_is_neutral(name: str) -> None:
    case = RUNS[name]
    model, feed = one_node(case)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    for output in next(iter(model.graph)).outputs[1:]:
        output.type = ir.TensorType(ir.DataType(kind))
        model.graph.outputs.append(output)
    (site,) = explain(model).sites
    patch = fire_on_some(model, draw_patch(model), feed, share=0.5)
    base, outputs = run(model, feed), run(bake(model, patch, site_flags=True), feed)
    flags = outputs[f"atpatch/{site.name}/flags"]
    (some, tokens) = np.nonzero(flags)
    for present, neutral in (("more_1", patch.sites[0].neutral.key), ("more_2", patch.sites[0].neutral.value)):
        changed = (outputs[present] != base[present]).any(axis=(1, 3))  # [samples, positions]
        assert changed.sum() == flags.sum()
        for sample, position in zip(*np.nonzero(changed), strict=True):
            assert np.array_equal(outputs[present][sample, :, position], neutral)
        assert np.array_equal(np.unique(np.nonzero(changed)[0]), np.unique(some))
    assert len(tokens)


# The rule


def found(case: Case, **options: Any):
    matches = explain(one_node(case, **options)[0])
    assert len(matches.sites) + len(matches.near_misses) == 1
    return matches


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "queries", "keys", "depth", "masked"),
    [
        ("mha_plain", N, N, S, L, H, False),
        ("mha_other_depth", N, N, S, L, 5, False),
        ("mha_mask_ends_0", N, N, S, L, H, True),
        ("mha_past_0", N, N, S, L, H, True),
        ("mha_per_head_0", N, N, S, L, H, False),
        ("mha_per_head_1", N, N, S, L, H, True),
        ("gqa_prompt_plain", HEADS, KV, TOKENS, TOKENS, DEPTH, True),
        ("gqa_packed", HEADS, KV, TOKENS, TOKENS, DEPTH, True),
        ("gqa_next_bias", HEADS, KV, 1, 1, DEPTH, True),
        ("gqa_next_plain", HEADS, KV, 1, 1, DEPTH, True),
    ],
)
def test_sites(name: str, heads: int, kv_heads: int, queries: int, keys: int, depth: int, masked: bool) -> None:
    """Keys are those that are computed here, not those in a cache."""
    (site,) = found(CASES[name]).sites
    assert (site.form, site.output, site.map) == (Form.FUSED, "Y", None)
    assert (site.heads, site.queries, site.keys, site.value.depth) == (heads, queries, keys, depth)
    assert site.key.heads == site.value.heads == kv_heads
    assert site.masked is masked


def test_keys_of_unknown_width_are_refused() -> None:
    """Nobody could say how large a detector is to be."""
    model = fused_model(MHA, SEPARATE, num_heads=N, free=True)
    for name in ("key", "value"):
        value = next(value for value in model.graph.inputs if value.name == name)
        value.shape = ir.Shape(["batch", f"{name}_length", "width"])
    (miss,) = explain(model).near_misses
    assert miss.attention
    assert "its keys do not stand token by token" in miss.reason


def test_keys_of_symbolic_lengths() -> None:
    (site,) = found(CASES["mha_past_0"], free=True).sites
    assert site.keys == "key_1"


def test_packed_projections_are_sites() -> None:
    (site,) = found(Case(MHA, {"query": floats(B, S, N, 3, H)}, {"num_heads": N})).sites
    assert (site.queries, site.keys, site.key.depth, site.key.value, site.value.value) == (S, S, H, "query", "query")
    feeds = {"query": floats(B, S, N * H), "key": floats(B, L, N, 2, H)}
    (site,) = found(Case(MHA, feeds, {"num_heads": N})).sites
    assert (site.queries, site.keys, site.key.depth, site.key.value, site.value.value) == (S, L, H, "key", "key")


GROUPED = {"num_heads": HEADS, "kv_num_heads": KV, "outputs": 3}

NO_KEYS = {"key": floats(B, 0, KV * DEPTH), "value": floats(B, 0, KV * DEPTH)}

REFUSED = {
    "unknown form": Case(MHA, {"query": floats(B, S, 3 * N * H)}, {"num_heads": N}),
    "bias beside packed": Case(
        MHA, {"query": floats(B, S, N * H), "key": floats(B, L, N, 2, H)} | BIAS, {"num_heads": N}
    ),
    "its bias is computed": Case(MHA, SEPARATE | BIAS, {"num_heads": N}),
    "no separate keys": Case(GQA, STEPS["next"] | NO_KEYS, GROUPED),
    "not all are given": Case(GQA, {name: a for name, a in PROMPT.items() if name != "value"}, GROUPED),
    "element type is DOUBLE": Case(MHA, {n: a.astype(np.float64) for n, a in SEPARATE.items()}, {"num_heads": N}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str) -> None:
    case = REFUSED[reason]
    matches = explain(fused_model(case.op, case.feeds, **case.attributes))  # a bias is an input here
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert miss.attention
    assert miss.reason.startswith("attention, but ")
    assert reason in miss.reason


@pytest.mark.parametrize("op", ["PackedMultiHeadAttention", "SparseAttention", "QAttention"])
def test_operators_that_hide_their_keys_are_refused(op: str) -> None:
    model = fused_model(MHA, SEPARATE, num_heads=N)
    model.graph.node(0).op_type = op
    (miss,) = explain(model).near_misses
    assert miss.attention
    assert f"fused into com.microsoft::{op}" in miss.reason


UNTOUCHED = {
    "sliding cache": Case(GQA, STEPS["next"], {**GROUPED, "sliding_window_cache": 1, "local_window_size": 2}),
    "quantized cache": Case(GQA, STEPS["next"], {**GROUPED, "k_quant_type": "PER_TENSOR"}),
    "key norm": Case(GQA, PROMPT | {"q_norm_weight": floats(DEPTH), "k_norm_weight": floats(DEPTH)}, GROUPED),
    "shared buffer": Case(MHA, SEPARATE | CACHE | {"past_length": ints(2)}, {"num_heads": N, "outputs": 3}),
    "padding of four axes": Case(
        MHA, SEPARATE | {"key_padding_mask": np.ones((B, 1, S, L), np.int32)}, {"num_heads": N}
    ),
}
"""What the operator does with its keys is its own affair: they are replaced before it does."""


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_the_operator_does_with_its_keys_is_its_own_affair(name: str) -> None:
    model = fused_model(UNTOUCHED[name].op, UNTOUCHED[name].feeds, **UNTOUCHED[name].attributes)
    before = ir.to_proto(model.graph.node(0))
    (site,) = explain(model).sites
    assert (site.key.value, site.value.value) == ("key", "value")
    baked = bake(model, draw_patch(model))
    after = ir.to_proto(next(node for node in baked.graph if node.name == "attend"))
    replaced = {index for index, (a, b) in enumerate(zip(before.input, after.input, strict=True)) if a != b}
    assert replaced == {1, 2}, "its keys and values, and nothing else of it"
    del before.input[:], after.input[:]
    assert before == after


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
    """A site that rehearses, or refused with the advice."""
    nodes = refused = 0
    for name, proto in fused_exports():
        model = ir.from_proto(proto)
        fused = [node for node in model.graph if (node.domain, node.op_type) in RULE.anchors]
        if not fused:
            continue
        nodes += len(fused)
        matches = explain(model)
        sites = {site.output for site in matches.sites if site.form is Form.FUSED}
        hidden = {node.outputs[0].name for node in fused if node.op_type == ATTENTION}
        assert sites == {node.outputs[0].name for node in fused} - hidden, name
        refused += sum("projects queries, keys and values itself" in miss.reason for miss in matches.near_misses)
        if sites:
            rehearsal = rehearse(model, random_inputs(proto), optimize=(True,), threads=1)
            assert rehearsal.runs, f"{name}: {rehearsal.reason}"
            assert rehearsal.failures == (), name
    assert nodes == 24
    assert 0 < refused < nodes
