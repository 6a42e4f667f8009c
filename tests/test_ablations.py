"""The ablations change what they say, and nothing else: on a planted backdoor whose truth is known."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import run
from planted import QUICK, Planted

import atpatch_onnx as atp
from atpatch_onnx.baking import reference
from atpatch_onnx.baking.probe import key_output, probe, value_output
from atpatch_onnx.fitting.collect import collect, find_suspects
from atpatch_onnx.fitting.fit import train
from atpatch_onnx.fitting.switchboard import Setting, Switchboard
from atpatch_onnx.graph import copy
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import find_sites
from samples import redistributions
from samples.ablations import RATES, REDISTRIBUTIONS, Row, ablate
from samples.case import Case

PLANTED = Planted(drawn=(0,), harmful=(2,))
"""Seen at the first site only, harmful at the last only: the fix lives by its carry."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Row]:
    base = tmp_path_factory.mktemp("planted") / "base.onnx"
    atp.save(PLANTED.model(), base)
    case = Case("planted", 0, base, PLANTED.debug(480), PLANTED.debug(200), QUICK)
    return {row.variant: row for row in ablate(case)}


def test_the_method_as_it_is_does_it(rows):
    outcome = next(row.outcome for name, row in rows.items() if name.startswith("as it is"))
    assert outcome.remaining <= 0.02
    assert outcome.recall >= 0.99


def test_every_variant_is_there(rows):
    assert set(REDISTRIBUTIONS) <= set(rows)
    assert {"zero key", "without carry", "hidden detectors"} <= set(rows)


def test_without_carry_nothing_reaches_the_harmful_site(rows):
    assert rows["without carry"].outcome.remaining >= 0.9


def test_lower_thresholds_flag_more(rows):
    flagged = [rows[f"threshold at {rate:.2%} of clean inputs"].outcome.clean_flag_rate for rate in RATES]
    assert flagged == sorted(flagged)
    assert flagged[-1] > flagged[0]


# What each way to redistribute computes, against numpy: one site, whose map and output are looked at

ONE = Planted(layers=1, drawn=(0,), harmful=(0,))


@pytest.fixture(scope="module")
def seen() -> dict[str, np.ndarray]:
    """Keys, values, map and output of the only site, flags and the neutral token, for a few inputs."""
    model, debug = ONE.model(), ONE.debug(60, suspects=True)
    (site,) = find_sites(model)
    (tokens,) = collect(model, [site], find_suspects(model, [site], debug))
    ((_, entry),) = train([tokens], "linear", QUICK)
    inputs = {name: array[:6] for name, array in debug.counterfactual.items()}
    found = run(probe(model, [site]), inputs)
    heads = {"key": site.key, "value": site.value}
    arrays = {
        name: found[output].reshape(*found[output].shape[:2], place.heads, place.depth).swapaxes(1, 2)
        for (name, place), output in zip(heads.items(), (key_output(site), value_output(site)), strict=True)
    }
    scores = entry.detector.scores(found[key_output(site)])
    threshold = float(np.float32(np.sort(scores.ravel())[-6:-4].mean()))
    base = copy(model)
    for name in (site.map, site.output):
        base.graph.outputs.append(find_value(base.graph, name))
    own = run(base, inputs)
    return {
        **arrays,
        "P": own[site.map].astype(np.float64),
        "Y": own[site.output],
        "M": scores > threshold,
        "model": model,
        "site": site,
        "entry": entry,
        "inputs": inputs,
        "threshold": threshold,
    }


def changed(seen: dict, change: object) -> np.ndarray:
    """The output of the site in the graph of the search, redistributed in another way."""
    site, looked = seen["site"], []

    def look(board: ir.Model, written: object) -> None:
        change(board, written)
        board.graph.outputs.append(find_value(board.graph, site.output))
        looked.append(board)

    Switchboard(seen["model"], [(site, seen["entry"])], "logits", change=look)
    feed = {
        f"atpatch/{site.name}/threshold": np.array([seen["threshold"]], np.float32),
        f"atpatch/{site.name}/level": np.zeros(1, np.float32),
    }
    return run(looked[0], {**seen["inputs"], **feed})[site.output]


def heads_of(Y: np.ndarray, like: np.ndarray) -> np.ndarray:
    return Y.reshape(like.shape)


@pytest.mark.parametrize("own", [False, True], ids=["neutral value", "own value"])
def test_columns_of_the_map_are_what_the_reference_makes_of_them(seen, own):
    assert 0 < seen["M"].sum() < seen["M"].size
    P = reference.redistributed_columns(seen["P"], seen["M"], 1.0)
    V = seen["value"] if own else reference.replaced(seen["value"], seen["M"], seen["entry"].neutral.value)
    expected = reference.attend(P, V)
    found = changed(seen, redistributions.papers_columns if own else redistributions.benign_columns)
    np.testing.assert_allclose(heads_of(found, expected), expected, atol=1e-5 * np.abs(expected).max())


def test_masked_out_tokens_get_nothing_and_the_others_all(seen):
    hidden = np.where(seen["M"][:, None, None, :], 0.0, seen["P"])
    expected = reference.attend(hidden / hidden.sum(-1, keepdims=True), seen["value"])
    found = changed(seen, redistributions.masked_out)
    np.testing.assert_allclose(heads_of(found, expected), expected, atol=1e-5 * np.abs(expected).max())


def test_a_value_alone_leaves_the_map_as_it_was(seen):
    expected = reference.attend(seen["P"], reference.replaced(seen["value"], seen["M"], seen["entry"].neutral.value))
    found = changed(seen, redistributions.value_alone)
    np.testing.assert_allclose(heads_of(found, expected), expected, atol=1e-5 * np.abs(expected).max())


def test_a_key_alone_leaves_the_values_as_they_were(seen):
    both = changed(seen, lambda board, written: None)
    alone = changed(seen, redistributions.key_alone)
    given = replace(seen["entry"], neutral=replace(seen["entry"].neutral, value=seen["entry"].neutral.value + 1))
    again = changed({**seen, "entry": given}, redistributions.key_alone)
    assert not np.array_equal(alone, both)
    np.testing.assert_array_equal(alone, again)


def test_a_setting_that_redistributes_nowhere_changes_nothing(seen):
    board = Switchboard(seen["model"], [(seen["site"], seen["entry"])], "logits", change=redistributions.masked_out)
    plain = Switchboard(seen["model"], [(seen["site"], seen["entry"])], "logits")
    setting = Setting({seen["site"].name: seen["threshold"]})
    one, other = (each.run(seen["inputs"], setting).logits for each in (board, plain))
    np.testing.assert_array_equal(one, other)
