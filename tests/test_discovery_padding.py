"""Texts of unlike lengths: what all of a batch pad is not run, and predictions stay what they were."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from planted import Planted
from searched import PAD, TRIGGER_WORD, of_words, texts

from atpatch_onnx.discovery.gathering import gather
from atpatch_onnx.discovery.hunting import judge
from atpatch_onnx.discovery.padding import Padding, padding_of

TOKENS = 14


def padded(count: int = 400) -> dict[str, np.ndarray]:
    """Texts of three to eight words, padded to more than any has; one in ten has the trigger."""
    generator = np.random.default_rng(3)
    ids = np.full((count, TOKENS), PAD, np.int64)
    ids[:, :8] = texts(count)["ids"]
    lengths = generator.integers(3, 9, size=count)
    ids[np.arange(TOKENS) >= lengths[:, None]] = PAD
    rows = np.arange(0, count, 10)
    ids[rows, generator.integers(lengths[rows])] = TRIGGER_WORD
    return {"ids": ids}


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=7), st.integers(1, 4))
def test_nothing_that_is_read_is_cut(ids, size):
    texts, marks = np.array(ids, np.int64), np.arange(5 * len(ids)).reshape(-1, 5)
    seen = []
    for rows, batch in Padding("ids", PAD).batches({"ids": texts, "marks": marks, "row": np.arange(len(ids))}, size):
        assert 1 <= len(rows) <= size
        width = batch["ids"].shape[1]
        np.testing.assert_array_equal(batch["ids"], texts[rows, :width])
        np.testing.assert_array_equal(batch["marks"], marks[rows, :width])
        assert (texts[rows, width:] == PAD).all()
        assert width == 5 or (batch["ids"][:, -1] == PAD).all(), "one position of padding is left"
        assert width == 1 or (batch["ids"][:, -2:] != PAD).any(), "and no more"
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(len(ids)))


def test_a_board_says_the_same_without_padding():
    model, inputs = of_words(Planted(free=True)), padded()
    gathered = gather(model, inputs)
    some = np.random.default_rng(0).random(gathered.parts.shape) < 0.3
    flags = some & gathered.parts
    whole, cut = (
        replace(gathered, padding=padding).board(64).predict(inputs, flags) for padding in (None, Padding("ids", PAD))
    )
    assert (whole == cut).mean() > 0.9


def test_a_hunt_says_the_same_without_padding():
    gathered = gather(of_words(Planted(free=True)), padded())
    assert gathered.padding == Padding("ids", PAD)
    first, second = (judge(one) for one in (gathered, replace(gathered, padding=None)))
    assert first.verdict is second.verdict
    assert [part.target for part in first.parts] == [part.target for part in second.parts]


def test_what_is_no_padding_stays():
    model, whole = of_words(Planted(free=True)), texts(400)
    assert gather(model, whole).padding is None, "no text is padded"
    fixed = of_words()
    content = gather(fixed, whole).content
    assert padding_of(fixed, content, whole) is None, "the model reads one length"
