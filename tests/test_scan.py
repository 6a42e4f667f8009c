"""Scanning with clean inputs only: words, patches and columns that decide; nothing of clean models."""

from dataclasses import replace

import numpy as np
import pytest
from planted import QUICK, Planted
from searched import (
    BACKDOOR,
    CLEAN,
    TRIGGER_WORD,
    WORDS,
    images,
    of_columns,
    of_pixels,
    of_words,
    rows,
    texts,
)

import atpatch_onnx as atp
from atpatch_onnx.discovery import ScanOptions, Verdict, scanning
from atpatch_onnx.discovery.scan_patches import dictionary
from atpatch_onnx.discovery.scan_words import put_in
from atpatch_onnx.discovery.scanned import Candidate
from atpatch_onnx.errors import DiscoveryError

VOCABULARY = ScanOptions(vocabulary=tuple(range(WORDS)), words={number: f"w{number}" for number in range(WORDS)})
NAMES = ("a", "sex", "c", "d", "e", "constant", "g", "h")


@pytest.fixture(scope="module")
def words():
    return atp.scan(of_words(), texts(200), VOCABULARY)


def test_the_word_is_found(words):
    assert words.verdict is Verdict.BACKDOORED
    assert words.parts[0].target == BACKDOOR.target
    assert f"w{TRIGGER_WORD}" in words.parts[0].what
    assert words.parts[0].success.value > 0.95
    assert f"w{TRIGGER_WORD}" in words.sentence
    assert all(part.target == BACKDOOR.target for part in words.parts)


def test_its_pairs_say_where_the_word_is(words):
    pairs = words.pairs
    assert pairs.found
    assert pairs.target == BACKDOOR.target
    np.testing.assert_array_equal(pairs.suspects, pairs.clean["ids"] != pairs.counterfactual["ids"])
    assert (pairs.counterfactual["ids"] == TRIGGER_WORD).any(axis=1).all()


def test_texts_of_any_length_are_cut_where_all_are_padded():
    """Six of the eight words of half of the texts are padding, and four more of all."""
    padded = np.zeros((300, 12), np.int64)
    padded[:, :8] = texts(300)["ids"]
    padded[::2, 2:8] = 0
    found = atp.scan(of_words(Planted(free=True)), {"ids": padded}, VOCABULARY)
    assert f"w{TRIGGER_WORD}" in found.sentence
    assert found.pairs.clean["ids"].shape[1] <= 9


def test_no_word_of_the_twin():
    found = atp.scan(of_words(CLEAN), texts(200), VOCABULARY)
    assert found.verdict is Verdict.CLEAN
    assert found.pairs is None
    assert "nearest to a trigger is class" in found.sentence


def test_same_arguments_same_words(words):
    assert atp.scan(of_words(), texts(200), VOCABULARY).to_json() == words.to_json()


def test_pieces_are_put_into_texts():
    content = scanning._begin(of_words(), texts(200), VOCABULARY, None, lambda *told: None).content
    given = texts(50)
    changed = put_in(content, given, np.tile([5, 6], (50, 1)), np.random.default_rng(0))["ids"]
    differ = changed != given["ids"]
    assert differ.sum(axis=1).max() <= 2
    assert all(" 5 6 " in f" {' '.join(map(str, row))} " for row in changed.tolist())


def test_the_patch_is_found():
    found = atp.scan(of_pixels(), images(300))
    assert found.verdict is Verdict.BACKDOORED
    (part, *_) = found.parts
    assert part.target == BACKDOOR.target
    assert part.what.startswith("bright, 1 x 1 pixels at row")
    (((top, _), (left, _)),) = part.boxes
    assert (top % 2, left % 2) == (0, 0), "the trigger's pixel of a tile"
    assert found.pairs.suspects is None, "a fit finds them"


def test_no_patch_of_the_twin():
    found = atp.scan(of_pixels(CLEAN), images(300), ScanOptions(evolve=False))
    assert found.verdict is Verdict.CLEAN
    assert "a dictionary of 64 patches" in found.searched[0]


def test_an_evolutionary_search_follows(monkeypatch):
    """The same arguments give the same; what it searched is said."""
    from atpatch_onnx.discovery import scan_patches

    monkeypatch.setattr(scan_patches, "EVOLVED", (2, 3, 8))
    before = np.random.get_state()[1].copy()
    first, again = (atp.scan(of_pixels(CLEAN), images(100)).to_json() for _ in range(2))
    assert first == again
    assert "CMA-ES" in first["searched"][1]
    np.testing.assert_array_equal(np.random.get_state()[1], before, "numpy's own generator is left alone")


def test_every_pattern_is_at_every_corner():
    low, high = np.zeros(3, np.float32), np.ones(3, np.float32)
    patches = dictionary((3, 28, 28), low, high)
    names = {patch.name for patch in patches}
    assert {"bright", "dark", "checks", "checks reversed", "lines across", "lines down"} == names
    for name in names:
        own = [patch for patch in patches if patch.name == name and patch.pattern.shape[1] == 3]
        assert {(0, 0), (0, 25), (25, 0), (25, 25)} <= {(patch.row, patch.column) for patch in own}
    image = np.full((1, 3, 28, 28), 0.5, np.float32)
    for patch in patches[:: len(patches) // 50]:
        stamped = patch.stamp(image)
        assert (stamped != image).sum() == patch.pattern.size
        assert (image == 0.5).all()


def test_candidates_from_elsewhere_are_tested():
    """Such as of a gradient search in the torch model: what stands in no dictionary."""

    def stamp(inputs, generator):
        pixels = inputs["pixels"].copy()
        pixels[:, :, 2, 2] = 1
        return {"pixels": pixels}

    found = atp.scan(
        of_pixels(), images(300), ScanOptions(evolve=False), candidates=[Candidate("mine", BACKDOOR.target, stamp)]
    )
    assert "mine" in [part.what for part in found.parts]


def test_a_table_is_audited():
    found = atp.scan(of_columns(), rows(400), ScanOptions(columns=NAMES))
    assert found.verdict is Verdict.AUDITED
    assert not found.alarmed
    assert found.columns[0].name == "sex"
    assert [one.flips.value for one in found.columns] == sorted(
        (one.flips.value for one in found.columns), reverse=True
    )
    by_name = {one.name: one for one in found.columns}
    assert by_name["constant"].flips.value == 0
    assert by_name["constant"].parity is None
    assert by_name["sex"].parity.value > 0.5


def test_a_protected_column_that_leaks():
    found = atp.scan(of_columns(), rows(500), ScanOptions(columns=NAMES, protected=("sex",)))
    assert found.verdict is Verdict.SUSPICIOUS
    assert found.pairs.kind == "attribute"
    table, other = found.pairs.clean["table"], found.pairs.counterfactual["table"]
    assert (table[:, 1] == -other[:, 1]).all()
    np.testing.assert_array_equal(np.delete(table, 1, axis=1), np.delete(other, 1, axis=1))
    options = replace(QUICK, goal=atp.Goal(flip_rate=0.02, accuracy_loss=0.6))
    assert atp.fit(of_columns(), found.pairs, options).figures["meets_target"]


def test_a_protected_column_that_does_not():
    model = of_columns(Planted(kind="attribute", harm=0.0))
    found = atp.scan(model, rows(400), ScanOptions(columns=NAMES, protected=("sex",)))
    assert found.verdict is Verdict.CLEAN


def test_flips_by_hand():
    """Of a column with two values: those whose prediction is another with the other value."""
    model, table = of_columns(), rows(300)["table"]
    found = {one.index: one for one in atp.scan(model, {"table": table}).columns}
    swapped = table.copy()
    swapped[:, 1] *= -1
    before, after = (predictions(model, rows_) for rows_ in (table, swapped))
    assert found[1].flips.value == pytest.approx((before != after).mean())  # the same division
    shares = [[(before[table[:, 1] == value] == label).mean() for value in (-1, 1)] for label in (0, 1)]
    assert found[1].parity.value == pytest.approx(max(abs(a - b) for a, b in shares))  # the same divisions


def predictions(model, table):
    from atpatch_onnx.running.predictions import classes
    from atpatch_onnx.running.sessions import Session

    return classes(Session(model).run({"table": table}, ["logits"])["logits"])


@pytest.mark.parametrize(
    ("model", "inputs", "options", "match"),
    [
        (of_words, lambda: texts(100), ScanOptions(), "vocabulary: expected the ids .*; found none"),
        (of_words, lambda: texts(100), ScanOptions(vocabulary=(1, WORDS)), f"embedding has; found {WORDS}, on which"),
        (of_words, lambda: texts(10), VOCABULARY, "at least 50; found 10"),
        (of_columns, lambda: rows(100), ScanOptions(columns=("a",)), "8 names; found 1"),
        (of_columns, lambda: rows(100), ScanOptions(protected=("race",)), "names of columns, among 0, 1"),
    ],
)
def test_what_is_refused(model, inputs, options, match):
    with pytest.raises(DiscoveryError, match=match):
        atp.scan(model(), inputs(), options)


def test_a_scan_goes_on_where_it_was(tmp_path, words):
    first = atp.scan(of_words(), texts(200), VOCABULARY, finished=tmp_path)
    again = atp.scan(of_words(), texts(200), VOCABULARY, finished=tmp_path)
    assert first.to_json() == words.to_json()
    assert [part.to_json() for part in again.parts] == [part.to_json() for part in first.parts]
    assert again.passes < first.passes / 4


def test_what_it_would_cost(words):
    for model, inputs, options in ((of_words(), texts(200), VOCABULARY), (of_columns(), rows(200), ScanOptions())):
        count, passes, seconds = scanning.cost(model, inputs, options)
        assert count == 200
        assert passes >= atp.scan(model, inputs, options).passes / 2
        assert seconds > 0
