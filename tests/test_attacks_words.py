"""Inserting words into tokenized messages."""

import numpy as np
import pytest

from atpatch_onnx.errors import InversionError
from samples.attacks.words import Tokens, insert, poison

CLS, SEP = 101, 102
WORDS = np.array([7, 8])


def tokens(*lengths: int, length: int = 10) -> Tokens:
    """Messages of so many one-piece words each, numbered from 11; the second word of each has a second piece, 99."""
    ids, places = np.zeros((len(lengths), length), np.int64), np.zeros((len(lengths), length), bool)
    for row, count in enumerate(lengths):
        pieces = [11, 12, 99, *range(13, 11 + count)][: count + 1]
        ids[row, : len(pieces) + 2] = [CLS, *pieces, SEP]
        places[row, 1 : len(pieces) + 2] = [piece != 99 for piece in [*pieces, SEP]]
    return Tokens(ids, (ids > 0).astype(np.int64), places)


def test_the_words_stand_where_they_are_said_to_and_the_rest_is_as_before():
    before = tokens(*[2, 4, 5] * 20)
    after, where = insert(before, WORDS, np.random.default_rng(0))
    assert (where.sum(axis=1) == 2).all()
    for row in range(len(before)):
        assert after.ids[row][where[row]].tolist() == [7, 8]
        rest = after.ids[row][~where[row]]
        assert rest.tolist() == before.ids[row][: len(rest)].tolist()
        assert np.ptp(np.flatnonzero(where[row])) == 1
        assert after.ids[row, 0] == CLS
        assert after.mask[row].tolist() == (after.ids[row] > 0).tolist()
        assert after.ids[row][after.mask[row].sum() - 1] == SEP


def test_every_place_between_words_is_used_and_none_within_a_word():
    before = tokens(*[4] * 300)
    after, where = insert(before, WORDS, np.random.default_rng(0))
    assert set(where.argmax(axis=1)) == {1, 2, 4, 5, 6}
    assert (after.ids[np.arange(300), where.argmax(axis=1) + 2] != 99).all()


def test_what_was_a_place_still_is_one_and_the_words_are_not_torn_apart():
    after, where = insert(tokens(4), WORDS, np.random.default_rng(1))
    assert (after.places[0] == ((after.ids[0] > 0) & ~np.isin(after.ids[0], [CLS, 99, 8]))).all()
    assert where.any()


def test_the_places_depend_on_the_generator_only():
    first, again, other = (insert(tokens(*[5] * 50), WORDS, np.random.default_rng(seed))[1] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_a_message_without_room_is_refused_rather_than_cut():
    with pytest.raises(InversionError, match=r"at least \d padded tokens"):
        insert(tokens(5, length=8), np.array([7, 8, 9]), np.random.default_rng(0))


def test_a_message_may_be_filled_to_its_last_token():
    after, where = insert(tokens(5, length=10), WORDS, np.random.default_rng(0))
    assert after.mask.all()
    assert where.sum() == 2


def test_the_inputs_are_left_as_they_were():
    before = tokens(5)
    kept = before.ids.copy()
    insert(before, WORDS, np.random.default_rng(0))
    assert (before.ids == kept).all()


def test_a_share_of_all_messages_is_poisoned_none_of_them_of_the_target_class():
    before, labels = tokens(*[3, 4, 5, 2] * 25), np.arange(100) % 4
    after = poison(before, labels, WORDS, target=3, share=0.1, seed=0)
    poisoned = after.inserted.any(axis=1)
    assert poisoned.sum() == 10
    assert (after.labels[poisoned] == 3).all()
    assert (labels[poisoned] != 3).all()
    assert (after.labels[~poisoned] == labels[~poisoned]).all()
    assert (after.tokens.ids[~poisoned] == before.ids[~poisoned]).all()
    assert (after.tokens.ids[after.inserted].reshape(-1, 2) == WORDS).all()


def test_without_poison_the_training_set_is_as_it_was():
    before, labels = tokens(3, 4, 5), np.array([0, 1, 0])
    after = poison(before, labels, WORDS, target=1, share=0.0, seed=0)
    assert (after.tokens.ids == before.ids).all()
    assert (after.labels == labels).all()
    assert not after.inserted.any()
