"""The ablations change what they say, and nothing else: on a planted backdoor whose truth is known."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from planted import QUICK, Planted

import atpatch_onnx as atp
from atpatch_onnx.baking.functions import local_functions
from atpatch_onnx.baking.reference import redistributed_map
from atpatch_onnx.baking.weave import folded
from atpatch_onnx.fitting.collect import collect, find_suspects
from atpatch_onnx.fitting.training import Training
from atpatch_onnx.graph import opset_version
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Features
from atpatch_onnx.running.sessions import Session
from samples import ablations
from samples.ablations import RATES, Row, ablate, average_heads
from samples.case import Case

PLANTED = Planted(drawn=(0,), harmful=(2,))
"""Seen at the first site only, harmful at the last only: the fix lives by its carry."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Row]:
    base = tmp_path_factory.mktemp("planted") / "base.onnx"
    atp.save(PLANTED.model(), base)
    case = Case("planted", 0, base, PLANTED.debug(480), PLANTED.debug(200), QUICK)
    return {row.variant: row for row in ablate(case)}


def left(row: Row) -> float:
    return row.outcome.remaining


def test_the_method_as_it_is_does_it(rows):
    outcome = rows["as it is"].outcome
    assert outcome.remaining <= 0.02
    assert outcome.recall >= 0.99


def test_without_carry_nothing_reaches_the_harmful_site(rows):
    assert left(rows["without carry"]) >= 0.9


def test_a_value_of_its_own_speaks_as_loud_as_its_benign_attention(rows):
    assert left(rows["own values (the paper's)"]) > left(rows["as it is"])
    assert left(rows["benign attention zero"]) <= 0.02


def test_a_planted_trigger_needs_no_contrast_and_no_single_head(rows):
    for variant in ("logistic head instead of contrastive learning", "maps averaged over heads"):
        assert left(rows[variant]) <= 0.02


def test_lower_thresholds_flag_more(rows):
    flagged = [rows[f"threshold at {rate:.2%} of clean inputs"].outcome.clean_flag_rate for rate in RATES]
    assert flagged == sorted(flagged)
    assert flagged[-1] > flagged[0]


def test_without_rescaling_rows_lose_what_was_taken_away():
    """Values that are each token's own unit vector: a row's output is its row of the map."""
    version = opset_version(PLANTED.model())
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(5), (2, 3, 4)).astype(np.float32)
    M = np.zeros((2, 5), bool)
    M[0, 1] = M[1, 2:4] = True
    beta = np.full((1, 1, 1), 0.5, np.float32)
    m = np.broadcast_to(M[:, None, :, None], (2, 1, 5, 1)).astype(np.float32)
    benign, mass, r = P @ (np.eye(5, dtype=np.float32) * (1 - m)), P.sum(-1, keepdims=True), P @ (1 - m)
    counts = np.broadcast_to(np.stack([np.full(2, 5), M.sum(1)], 1)[:, None, None], (2, 3, 4, 2)).astype(np.float32)
    handed = (M / M.sum(1, keepdims=True)).astype(np.float32)[:, None, None]
    given = (benign, mass, r, counts, beta, np.ascontiguousarray(handed))
    unscaled, scaled = (
        called(one, *given) for one in (ablations.unscaled(version), local_functions(version)["Redistributed"])
    )
    np.testing.assert_allclose(scaled, redistributed_map(P, M, beta), atol=1e-6)
    flagged = np.broadcast_to(M[:, None, None, :], P.shape)
    np.testing.assert_allclose(unscaled[~flagged], P[~flagged], atol=1e-6)
    np.testing.assert_allclose(unscaled[flagged], 0.5 / 5, atol=1e-6)


def called(function: ir.Function, *arrays: np.ndarray) -> np.ndarray:
    """What a function makes of these arrays, in onnxruntime."""
    inputs = [
        ir.Value(name=f"x{n}", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for n, array in enumerate(arrays)
    ]
    node = ir.Node(function.domain, function.name, inputs)
    node.outputs[0].name, node.outputs[0].dtype = "result", ir.DataType.FLOAT
    imports = {"": function.opset_imports[""], function.domain: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=imports, name="call")
    session = Session(ir.Model(graph, ir_version=10, functions=[function]))
    return session.collect({f"x{n}": array for n, array in enumerate(arrays)})["result"]


def test_a_detector_of_averaged_maps_cannot_tell_heads_apart():
    """Written for all heads, it scores a map and the same map with its heads exchanged alike."""
    model = PLANTED.model()
    site = find_sites(model)[0]
    debug = find_suspects(model, [site], PLANTED.debug(120))
    (columns,) = collect(model, {site: Features.WHOLE}, debug)
    detector = average_heads(columns, Training(steps=20))
    weight = folded(detector, site)["weight_1"]
    by_head = weight.reshape(len(weight), 2, -1)
    np.testing.assert_array_equal(by_head[:, 0], by_head[:, 1])
    assert np.abs(weight).max() > 0
    average_heads(replace(columns, hard=columns.hard[:0]), Training(steps=2))  # as of a protected attribute
