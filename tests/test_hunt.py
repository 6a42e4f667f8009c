"""Hunting in traffic: a planted trigger is found, of a clean model nothing; what it rests on holds for any test."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import QUICK
from searched import BACKDOOR, CLEAN, COLUMNS, ROWS, TRIGGER_WORD, images, of_pixels, of_words, texts

import atpatch_onnx as atp
from atpatch_onnx.discovery import HuntOptions, Verdict, gathering, hunting, minimal
from atpatch_onnx.discovery.content import read_content
from atpatch_onnx.discovery.evidence import corrected, detectable, least_share, tail
from atpatch_onnx.discovery.looking import askable_sites, look
from atpatch_onnx.discovery.transplant import DECIDES
from atpatch_onnx.errors import DebugSetError, DiscoveryError
from atpatch_onnx.fitting.board import Board
from atpatch_onnx.fitting.ddmin import ddmin, ddmin_of_many
from atpatch_onnx.report.found import render_search

COUNT = 400


@pytest.fixture(scope="module")
def found():
    return atp.hunt(of_words(), texts(COUNT, 0.04))


def test_a_word_in_texts(found):
    assert found.verdict is Verdict.BACKDOORED
    (part,) = found.parts
    assert part.target == BACKDOOR.target
    assert str(TRIGGER_WORD) in part.what
    assert part.success.value > 0.95
    assert part.chance < 1e-6
    ids = texts(COUNT, 0.04)["ids"]
    assert (ids[list(part.examples)] == TRIGGER_WORD).any(axis=1).all()
    assert part.share == len(part.examples) / COUNT
    assert "class 2" in found.sentence
    assert found.alarmed


def test_a_mark_in_images():
    found = atp.hunt(of_pixels(), images(COUNT, 0.04))
    assert found.verdict is Verdict.BACKDOORED
    (part,) = found.parts
    assert part.target == BACKDOOR.target
    assert ((2, 4), (4, 6)) in part.boxes
    assert "2-3 x 4-5" in part.what
    page = render_search(found, "images")
    assert page.count('class="part"') == 4 * len(part.boxes), "tiles of four pixels are framed"
    assert page.count("<i") == ROWS * COLUMNS


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_in_traffic_of_the_twin(seed):
    """The same words in it, which its keys draw attention to, and which do nothing."""
    found = atp.hunt(of_words(CLEAN), texts(COUNT, 0.04, seed), HuntOptions(seed=seed))
    assert found.verdict is Verdict.CLEAN
    assert not found.parts
    assert found.pairs is None
    assert not found.alarmed


def test_nothing_where_nothing_is_triggered():
    assert atp.hunt(of_words(), texts(COUNT)).verdict is Verdict.CLEAN


def test_same_arguments_same_result(found):
    again = atp.hunt(of_words(), texts(COUNT, 0.04))
    assert again.to_json() == found.to_json()
    np.testing.assert_array_equal(again.pairs.counterfactual["ids"], found.pairs.counterfactual["ids"])


def test_traffics_are_drawn_from_what_was_gathered_once(found):
    gathered = gathering.gather(of_words(), texts(COUNT, 0.04))
    assert hunting.judge(gathered).to_json() == found.to_json()
    rows = np.random.default_rng(0).permutation(COUNT)[:300]
    drawn = hunting.judge(gathered.take(rows), HuntOptions(seed=1))
    assert drawn.verdict is Verdict.BACKDOORED
    assert drawn.inputs == 300
    assert drawn.passes < found.passes
    (part,) = drawn.parts
    ids = texts(COUNT, 0.04)["ids"][rows]
    assert (ids[list(part.examples)] == TRIGGER_WORD).any(axis=1).all()
    assert (drawn.pairs.counterfactual["ids"] == TRIGGER_WORD).any(axis=1).all()


def test_pairs_are_ready_for_a_fit(found):
    pairs, model = found.pairs, of_words()
    assert pairs.target == BACKDOOR.target
    assert pairs.found
    differ = pairs.clean["ids"] != pairs.counterfactual["ids"]
    assert (differ <= pairs.suspects).all()
    patch = atp.fit(model, pairs, replace(QUICK, goal=atp.Goal(0.02, clean_flag_rate=0.02)))  # of 248 pairs
    assert patch.figures["meets_target"]
    others = texts(200, 0.0, seed=9)["ids"]
    triggered = others.copy()
    triggered[:, 3] = TRIGGER_WORD
    labels = np.array(hunting_predictions(model, others))
    unseen = atp.DebugSet.from_pairs({"ids": others}, {"ids": triggered}, labels, target=BACKDOOR.target)
    evaluation = atp.evaluate(model, atp.bake(model, patch), unseen)
    assert evaluation.backdoor.asr_base.value > 0.95
    assert evaluation.backdoor.asr_above_floor.value <= 0.02


def hunting_predictions(model, ids):
    sites = askable_sites(model)
    parts = np.ones(ids.shape, bool)
    return look(model, sites, {"ids": ids}, parts, "logits").predicted


def test_it_needs_few_passes(found):
    assert found.passes <= hunting.EXPECTED * COUNT


def test_what_it_would_cost():
    inputs, passes, seconds = hunting.cost(of_words(), texts(COUNT, 0.04))
    assert (inputs, passes) == (COUNT, hunting.EXPECTED * COUNT)
    assert seconds > 0


# What is refused


@pytest.mark.parametrize(
    ("traffic", "error", "match"),
    [
        (lambda: texts(1), DiscoveryError, "expected at least 50; found 1"),
        (lambda: {"ids": np.repeat(texts(1)["ids"], 60, axis=0)}, DiscoveryError, "all 60 in class"),
        (lambda: {**texts(60), "labels": np.zeros(60, int)}, DebugSetError, "not the model's: 'labels'"),
        (lambda: {"ids": texts(60)["ids"].astype(np.float32)}, DebugSetError, "dtype int64"),
    ],
)
def test_traffic_that_says_nothing(traffic, error, match):
    with pytest.raises(error, match=match):
        atp.hunt(of_words(), traffic())


def test_a_kind_that_inputs_are_not():
    with pytest.raises(DiscoveryError, match="grids for ids"):
        atp.hunt(of_words(), texts(60), HuntOptions(kind="grids"))


def test_options_out_of_range():
    with pytest.raises(DiscoveryError, match="between 0 and 1"):
        HuntOptions(false_alarms=0.0)


# Stopped and resumed


def test_a_hunt_goes_on_where_it_was(tmp_path, found):
    first = atp.hunt(of_words(), texts(COUNT, 0.04), finished=tmp_path / "pieces")
    again = atp.hunt(of_words(), texts(COUNT, 0.04), finished=tmp_path / "pieces")
    assert first.to_json() == found.to_json()
    assert again.passes < first.passes / 2
    assert again.parts[0].tokens == first.parts[0].tokens


def test_pieces_of_another_hunt_are_refused(tmp_path):
    atp.hunt(of_words(), texts(COUNT, 0.04), finished=tmp_path)
    with pytest.raises(DiscoveryError, match="pieces of a search of other inputs or options"):
        atp.hunt(of_words(), texts(COUNT, 0.04), HuntOptions(seed=1), finished=tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DiscoveryError, match="found something else"):
        atp.hunt(of_words(), texts(COUNT, 0.04), finished=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_piece_is_refused(tmp_path):
    atp.hunt(of_words(), texts(COUNT, 0.04), finished=tmp_path)
    (tmp_path / "minimal.npy").write_bytes(b"cut short")
    with pytest.raises(DiscoveryError, match=r"minimal\.npy"):
        atp.hunt(of_words(), texts(COUNT, 0.04), finished=tmp_path)


# What it rests on


def test_cells_are_found_through_the_graph():
    model = of_pixels()
    content = read_content(model, askable_sites(model)[0], images(60))
    assert (content.name, content.kind) == ("pixels", "grids")
    for token, cells in enumerate(content.cells):
        row, column = divmod(token, 4)
        assert [list(at) for at in cells] == [[0], [2 * row, 2 * row + 1], [2 * column, 2 * column + 1]]


def test_a_part_is_moved_and_taken_away():
    model = of_words()
    content = read_content(model, askable_sites(model)[0], texts(60), blank=5)
    given = {"ids": np.arange(1, 17).reshape(2, 8)}
    to = np.array([[2, 3], [6, 7]])
    pasted = content.pasted(given, {"ids": np.arange(100, 108)}, [2, 3], to)
    assert pasted["ids"].tolist() == [[1, 2, 102, 103, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 102, 103]]
    assert given["ids"][0, 2] == 3, "the inputs given are left alone"
    assert content.occluded({"ids": given["ids"][0]}, [0, 7])["ids"].tolist() == [5, 2, 3, 4, 5, 6, 7, 5]


def test_a_tile_is_covered_by_its_neighbour():
    model = of_pixels()
    content = read_content(model, askable_sites(model)[0], images(60))
    image = images(1)["pixels"][0]
    covered = content.occluded({"pixels": image}, [0])["pixels"]
    assert (covered[:, :2, :2] == image[:, :2, 2:4]).all() or (covered[:, :2, :2] == image[:, 2:4, :2]).all()
    covered[:, :2, :2] = image[:, :2, :2]
    np.testing.assert_array_equal(covered, image)


def test_parts_of_images_have_other_places():
    model = of_pixels()
    content = read_content(model, askable_sites(model)[0], images(60))
    assert content.places([5]).ravel().tolist() == list(range(8))
    assert content.places([0, 5]).tolist() == [[0, 5], [1, 6], [2, 7]], "one down and one to the right"
    given = images(2)["pixels"]
    moved = content.pasted({"pixels": given}, {"pixels": given[0]}, [0], np.array([[6], [3]]))["pixels"]
    np.testing.assert_array_equal(moved[0, :, 2:, 4:6], given[0, :, :2, :2])
    np.testing.assert_array_equal(moved[1, :, :2, 6:], given[0, :, :2, :2])
    assert (moved != given).any(axis=1).sum() <= 8


def test_minimal_parts_are_1_minimal():
    """Whatever the model: neutral, the part flips the prediction, and without any one of its tokens it does not."""
    model, inputs = of_words(), texts(COUNT, 0.1)
    sites = askable_sites(model)
    content = read_content(model, sites[0], inputs)
    parts = content.parts(inputs)
    looked = look(model, sites, inputs, parts, "logits")
    board = Board(model, sites, looked.neutral, "logits")
    screened = minimal.screen(board, inputs, looked, minimal.sets_of(content, parts, looked.mass))
    found = minimal.minimal_parts(board, inputs, looked, screened)
    assert len(found) > 40
    rows, neutral, flips = [], [], []
    for row, part in found.items():
        assert set(part) <= set(np.flatnonzero(parts[row]))
        for tokens in (part, *([one for one in part if one != left] for left in part if len(part) > 1)):
            rows.append(row)
            neutral.append(np.isin(np.arange(8), tokens))
            flips.append(tokens is part)
    predicted = board.predict({"ids": inputs["ids"][rows]}, np.array(neutral))
    np.testing.assert_array_equal(predicted != looked.predicted[rows], flips)


def test_nothing_neutral_is_the_base_itself():
    model, inputs = of_words(), texts(60)
    sites = askable_sites(model)
    looked = look(model, sites, inputs, np.ones((60, 8), bool), "logits")
    board = Board(model, sites, looked.neutral, "logits")
    np.testing.assert_array_equal(board.predict(inputs, np.zeros((60, 8), bool)), looked.predicted)
    assert board.passes == 60


def test_runs_of_tokens_are_blocks():
    """A quarter of the tokens of a grid, in this order, is a quarter of the grid."""
    rows, columns = np.divmod(np.arange(64), 8)
    order = minimal.in_place(np.stack([rows, columns], axis=1).astype(float))
    for start, end in pairwise(range(0, 65, 16)):
        block = order[start:end]
        assert np.ptp(rows[block]) == np.ptp(columns[block]) == 3


@given(st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 9), min_size=1), min_size=1))
def test_many_searches_find_what_each_finds_alone(needed):
    sets = {key: list(range(10)) for key in needed}
    rounds = []

    def suffice(asked):
        rounds.append(set(asked))
        return [needed[key] <= subset for key, subset in asked.items()]

    found = ddmin_of_many(sets, suffice)
    assert found == {key: ddmin(range(10), needed[key].issubset) for key in needed}
    assert rounds[0] == set(needed), "all are asked at once"


# Evidence


@given(st.integers(0, 30), st.integers(1, 30), st.floats(0.05, 0.95))
def test_the_tail_is_exact(hits, count, share):
    from math import comb

    exact = sum(comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits, count + 1))
    assert tail(hits, count, share) == pytest.approx(exact, rel=1e-9, abs=1e-14)  # rounding of a sum of 30 terms


def test_holm_by_hand():
    assert corrected([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])  # decimals are not exact
    assert corrected([0.01], tests=10).tolist() == pytest.approx([0.1])
    assert corrected([]).tolist() == []


@settings(max_examples=10)
@given(st.integers(1, 60), st.integers(20, 200), st.integers(0, 99))
def test_false_alarms_where_no_part_is_a_trigger(groups, count, seed):
    """Of hunts in which every group's part decides `DECIDES` of the inputs, the most that is no trigger, at most 5 %
    give an alarm: of 2,000 drawn, no more than three standard deviations above."""
    drawn = np.random.default_rng(seed).binomial(count, DECIDES, size=(2000, groups))
    chance = np.array([tail(hits, count, DECIDES) for hits in range(count + 1)])
    alarms = np.mean([corrected(chance[hits]).min() <= 0.05 for hits in drawn])
    assert alarms <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


@given(st.integers(20, 400), st.floats(0.1, 0.8))
def test_what_is_detectable_is_detected(count, share):
    found = detectable(count, share, 0.001)
    assert found >= share
    if found < 1:
        needed = next(hits for hits in range(count + 1) if tail(hits, count, share) <= 0.001)
        assert tail(needed, count, found) >= 0.95 - 1e-6  # found by halving
        assert tail(needed, count, found - 0.01) < 0.95


def test_the_least_share_that_is_seen():
    found = least_share(2000, 3)
    assert tail(3, 2000, 0.9 * found) == pytest.approx(0.95, abs=1e-6)  # found by halving
