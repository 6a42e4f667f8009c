"""Runs in turns, opened again and again, and ratios whose intervals cover what they are to cover."""

import time
import weakref

import numpy as np
import pytest

from atpatch_onnx.running.timing import WARM, in_turns, ratio


def test_each_form_runs_once_a_round_in_an_order_that_is_drawn_anew():
    order, opened, told = [], [], []

    def form(name):
        def opens():
            opened.append(name)
            return lambda: order.append(name)

        return opens

    forms = {name: form(name) for name in "abc"}
    taken = in_turns(forms, sessions=4, rounds=40, progress=lambda *said: told.append(said), stage="here")
    assert {name: seconds.shape for name, seconds in taken.items()} == dict.fromkeys("abc", (4, 10))
    sessions = np.array(order).reshape(4, 3 * (WARM + 10))
    rounds = sessions[:, 3 * WARM :].reshape(40, 3)
    assert all(set(one) == set("abc") for one in rounds)
    assert len({tuple(one) for one in rounds}) == 6
    assert all(set(one) == set("abc") for one in np.array(opened).reshape(4, 3))
    assert told == [("here", done, 40) for done in range(1, 41)]


@pytest.mark.parametrize(("sessions", "rounds", "shape"), [(4, 2, (2, 1)), (4, 10, (4, 3)), (1, 5, (1, 5))])
def test_sessions_share_the_rounds(sessions, rounds, shape):
    assert in_turns({"one": lambda: lambda: None}, sessions=sessions, rounds=rounds)["one"].shape == shape


def test_a_form_is_let_go_of_before_it_is_opened_again():
    alive, opened = weakref.WeakSet(), []

    class Large:
        def __call__(self):
            pass

    def opens():
        opened.append(len(alive))
        large = Large()
        alive.add(large)
        return large

    in_turns({"large": opens}, sessions=3, rounds=3)
    assert opened == [0, 0, 0]


def test_seconds_are_seconds_and_pauses_do_not_count():
    forms = {"slow": lambda: lambda: time.sleep(0.02), "fast": lambda: lambda: None}
    taken = in_turns(forms, sessions=1, rounds=5, pause=0.01)
    assert 0.02 <= np.median(taken["slow"]) < 0.04
    assert np.median(taken["fast"]) < 0.005


def test_one_session_gives_the_ratio_of_its_medians():
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.1, size=(1, 200))
    base, ours = 1 + noise, 1.2 + noise
    found = ratio(ours, base)
    assert found.value == pytest.approx(np.median(ours) / np.median(base))
    assert found.low < 1.2 < found.high
    assert found.high - found.low < 0.05
    assert ratio(ours, base) == found
    same = ratio(base, base)
    assert same.low == same.value == same.high == 1


def test_intervals_cover_what_sessions_differ_by():
    """Equal forms, each of whose sessions is faster or slower for as long as it lives, by 3 % or so."""
    rng = np.random.default_rng(0)
    sessions = [1, 8]
    covered = dict.fromkeys(sessions, 0)
    for _ in range(100):
        for count in sessions:
            luck = np.exp(rng.normal(scale=0.03, size=(2, count, 1)))
            ours, base = luck * np.exp(rng.normal(scale=0.02, size=(2, count, 40 // count)))
            found = ratio(ours, base)
            covered[count] += found.low <= 1 <= found.high
    assert covered[8] >= 80, "nearly what it says: a bootstrap of eight is somewhat narrow"
    assert covered[1] < 50, "one session knows nothing of its luck"
