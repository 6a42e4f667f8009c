"""Detectors: what they separate, what is folded into them, and that nothing depends on the machine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import HEADS, Planted

from atpatch_onnx.errors import FitError
from atpatch_onnx.fitting import detector as detector_module
from atpatch_onnx.fitting.collect import Tokens, collect
from atpatch_onnx.fitting.detector import train_detector
from atpatch_onnx.fitting.options import Training
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Neutral

FEATURES = 8
QUICK = Training(steps=20)

kinds = pytest.mark.parametrize("hidden", [False, True], ids=["linear", "hidden"])


@pytest.fixture(scope="module")
def planted_tokens() -> tuple[Tokens, ...]:
    planted = Planted(drawn=(0, 2), harmful=(2,))
    model = planted.model()
    return collect(model, find_sites(model), planted.debug(240, suspects=True))


@kinds
def test_planted_tokens_are_separated_and_innocent_ones_are_not(planted_tokens, hidden):
    for tokens in planted_tokens:
        detector = train_detector(tokens, Training(steps=300), hidden=hidden)
        anomalous, benign = (detector.scores(rows) for rows in (tokens.anomalous, np.r_[tokens.hard, tokens.benign]))
        if tokens.site.index in (0, 2):
            assert anomalous.min() > benign.max() + 1
        else:
            assert np.median(anomalous) < benign.max()


@kinds
def test_planted_tokens_of_other_inputs_are_separated_too(planted_tokens, hidden):
    planted = Planted(drawn=(0, 2), harmful=(2,))
    model = planted.model()
    (fresh,) = collect(model, find_sites(model)[:1], planted.debug(200, seed=9, suspects=True))
    detector = train_detector(planted_tokens[0], Training(steps=300), hidden=hidden)
    assert detector.scores(fresh.anomalous).min() > detector.scores(np.r_[fresh.hard, fresh.benign]).max()


def drawn(seed: int = 0, *, hard: int = 40) -> Tokens:
    rng = np.random.default_rng(seed)
    site = find_sites(Planted().model())[0]

    def rows(count: int, mean: float) -> np.ndarray:
        return (5 + 3 * rng.normal(mean, 1, size=(count, FEATURES))).astype(np.float32)

    neutral = Neutral(*(np.zeros((HEADS, FEATURES // HEADS), np.float32) for _ in range(2)))
    return Tokens(site, rows(50, 3), rows(hard, 0), rows(100, 0), neutral, 0)


def ring(seed: int = 0) -> Tokens:
    """Anomalous keys around the benign ones: no line parts them."""
    rng = np.random.default_rng(seed)
    around = rng.normal(size=(400, FEATURES))
    around *= 8 / np.linalg.norm(around, axis=1, keepdims=True)
    within = rng.normal(scale=0.5, size=(400, FEATURES))
    return replace(drawn(), anomalous=around.astype(np.float32), benign=within.astype(np.float32))


def test_a_hidden_layer_tells_what_no_line_does():
    tokens = replace(ring(), hard=np.zeros((0, FEATURES), np.float32))
    share = {}
    for hidden in (False, True):
        detector = train_detector(tokens, Training(steps=300), hidden=hidden)
        share[hidden] = np.mean(detector.scores(tokens.anomalous) > detector.scores(tokens.benign).max())
    assert share[True] > 0.99
    assert share[False] < 0.7


@kinds
def test_a_detector_has_the_shapes_of_the_patch_file(hidden):
    detector = train_detector(drawn(), Training(hidden=7, steps=5), hidden=hidden)
    arrays = (detector.weights, detector.bias, detector.output)
    if hidden:
        assert [array.shape for array in arrays] == [(FEATURES, 7), (7,), (7,)]
        assert all(array.dtype == np.float32 for array in arrays)
    else:
        assert detector.weights.shape == (FEATURES, 1)
        assert detector.weights.dtype == np.float32
        assert arrays[1:] == (None, None)
    assert detector.is_linear is not hidden
    assert detector.threshold == 0.0


@kinds
def test_scores_are_those_of_standardised_keys_but_for_one_number(hidden, monkeypatch):
    """Standardisation is folded into the weights, and what is added to all scores alike left out."""
    tokens, found = drawn(), []
    fold = detector_module._folded
    monkeypatch.setattr(detector_module, "_folded", lambda *trained: found.append(trained) or fold(*trained))
    detector = train_detector(tokens, QUICK, hidden=hidden)
    ((layers, mean, scale),) = found
    benign = np.concatenate([tokens.hard, tokens.benign]).astype(np.float64)
    np.testing.assert_allclose(mean, benign.mean(axis=0), rtol=1e-12)  # float64 sums
    rows = np.concatenate([tokens.anomalous, benign])
    with torch.no_grad():
        wanted = layers.double()(torch.from_numpy((rows - mean) / scale))[:, 0].numpy()
    difference = detector.scores(rows) - wanted
    # float32 weights of keys of the size of ten
    np.testing.assert_allclose(difference, difference.mean(), atol=1e-5 * np.abs(wanted).max())


@kinds
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_same_bits_on_any_number_of_threads_which_are_left_as_they_were(threads, hidden):
    expected, before = train_detector(drawn(), QUICK, hidden=hidden), torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(threads)  # nor does torch's own generator matter
    try:
        found = train_detector(drawn(), QUICK, hidden=hidden)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found.weights.tobytes() == expected.weights.tobytes()
    if hidden:
        assert found.bias.tobytes() == expected.bias.tobytes()
        assert found.output.tobytes() == expected.output.tobytes()


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(FitError):
            train_detector(replace(drawn(), anomalous=np.zeros((0, FEATURES), np.float32)), QUICK, hidden=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_another_seed_gives_another_detector():
    one, other = (train_detector(drawn(), QUICK, hidden=True, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one.weights, other.weights)


@kinds
def test_hard_negatives_may_be_missing(hidden):
    assert np.isfinite(train_detector(drawn(hard=0), QUICK, hidden=hidden).weights).all()


def test_hard_negatives_are_a_share_of_their_own_however_few():
    """A key that is anomalous but for the position's own feature is told from the few hard ones that share it."""
    tokens = drawn()
    tokens.anomalous[:, 0], tokens.hard[:, 0] = 50, 50
    few = replace(tokens, hard=tokens.hard[:2], benign=np.repeat(tokens.benign, 20, axis=0))
    detector = train_detector(few, Training(steps=300), hidden=False)
    assert detector.scores(few.hard).max() < detector.scores(few.anomalous).min()


@pytest.mark.parametrize(
    ("missing", "found"),
    [(("anomalous",), "0 anomalous, 140 benign"), (("hard", "benign"), "50 anomalous, 0 benign")],
)
def test_without_tokens_of_both_kinds_there_is_nothing_to_learn(missing, found):
    tokens = replace(drawn(), **dict.fromkeys(missing, np.zeros((0, FEATURES), np.float32)))
    with pytest.raises(FitError, match=rf"site layer0\.attention: expected anomalous and benign tokens.*found {found}"):
        train_detector(tokens, QUICK, hidden=False)


@kinds
def test_a_feature_that_never_varies_does_not_explode(hidden):
    tokens = drawn()
    for rows in (tokens.anomalous, tokens.hard, tokens.benign):
        rows[:, 0] = 1
    tokens.anomalous[0, 0] = 1.001
    detector = train_detector(tokens, QUICK, hidden=hidden)
    assert np.isfinite(detector.weights).all()
    assert np.abs(detector.weights[0]).max() < 100 * np.abs(detector.weights[1:]).max()
    usual = detector.scores(tokens.anomalous[1:])
    assert usual.min() - 1 < detector.scores(tokens.anomalous[:1])[0] < usual.max() + 1
