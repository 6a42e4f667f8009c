"""Which sequences of word pieces are searched, where it is known what each of them does."""

import numpy as np

from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.scan_words import JOINED, WordScan

ALONE = 7
"""Decides by itself."""

PHRASE = (30, 31)
"""Decides as a whole; each piece of it raises a little."""

PIECES = 400


class Known:
    """Texts of twenty words, and what every sequence raises in them, of one class or of two."""

    room = np.full(60, 20)

    def __init__(self, classes: int = 1) -> None:
        self.classes, self.asked = classes, []

    def decide(self, gains):
        return gains.max(axis=1) > 0.8

    def balanced(self, count, generator, allowed):
        return generator.permutation(np.flatnonzero(allowed))[:count]

    def gains(self, sequences, rows, generator):
        self.asked += map(tuple, sequences.tolist())
        found = np.zeros((len(sequences), self.classes))
        for at, sequence in enumerate(sequences.tolist()):
            said = " ".join(map(str, sequence))
            found[at, -1] = 0.001 * (sequence[0] % 17) + 0.05 * len({*PHRASE} & {*sequence})
            if ALONE in sequence or " ".join(map(str, PHRASE)) in said:
                found[at, -1] = 0.97
        return found


def run(texts):
    return list(WordScan(texts, Finished(None, {}, {}), 0).run(np.arange(1, PIECES)))


def test_a_phrase_is_found_beside_a_word_that_decides_alone():
    texts = Known()
    single, pairs, triples = run(texts)
    best = [scored.sequences[scored.gains[:, 0].argmax()].tolist() for scored in (single, pairs)]
    assert best == [[ALONE], list(PHRASE)]
    assert not (pairs.sequences == ALONE).any(), "with it every pair would decide"
    assert triples.gains.max() < 0.9, "nor is the phrase in a longer one"
    assert not any(ALONE in sequence for sequence in texts.asked if len(sequence) > 1)


def test_what_decides_takes_no_place_of_others():
    for classes in (1, 2):
        single = run(Known(classes))[0]
        deciding, others = single.parted()
        assert deciding.sequences.tolist() == [[ALONE]]
        assert JOINED <= len(others.sequences) <= classes * JOINED


def test_where_everything_decides_nothing_is_joined():
    class Sure(Known):
        def gains(self, sequences, rows, generator):
            self.asked += map(tuple, sequences.tolist())
            return np.ones((len(sequences), self.classes))

    texts = Sure()
    assert len(run(texts)) == 1
    assert {len(sequence) for sequence in texts.asked} == {1}


def test_a_phrase_is_found_of_whose_words_only_one_raises_anything():
    class Half(Known):
        def gains(self, sequences, rows, generator):
            self.asked += map(tuple, sequences.tolist())
            said = [f" {' '.join(map(str, sequence))} " for sequence in sequences.tolist()]
            found = np.array([0.97 if " 200 333 " in one else 0.05 if " 333 " in one else 0.0 for one in said])
            return np.tile(found[:, None], self.classes)

    _, pairs, *_ = run(Half())
    assert pairs.sequences[pairs.gains[:, 0].argmax()].tolist() == [200, 333]
